"""What a model loses with fewer experts: one loss for each domain, method and number of experts, kept as they come.

Shapes: L MoE layers in model order, E routed experts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from emo_megatron.commands.retention_options import RetentionOptions, domain_files
from emo_megatron.experts.calibration import Calibration, Documents
from emo_megatron.experts.select import (
    LAYERWISE,
    NEEDS_OUTPUTS,
    RANDOM,
    parse_keep,
    select_by_stats,
    select_layerwise,
    select_random,
)
from emo_megatron.experts.stats import ExpertStatistics
from emo_megatron.files import must_be_writable, whole
from emo_megatron.json_files import checked, read_object, to_json
from emo_megatron.runners.base import StudiedModel, collect_stats

FULL = "full"
"""The method of the rows with all experts."""
_KINDS: dict[str, type] = {
    **dict.fromkeys(("domain", "evaluated_on", "method", "origin"), str),
    **dict.fromkeys(("num_experts_kept", "tokens"), int),
    **dict.fromkeys(("keep_fraction", "loss"), float),
}
"""Of a row in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One row to measure."""

    domain: str
    """Whose calibration documents choose the experts."""
    evaluated_on: str
    """Whose held-out documents are read."""
    num_kept: int
    """Routed experts a layer."""
    method: str

    @property
    def key(self) -> str:
        """Names the row in the file."""
        return f"{self.domain}|{self.evaluated_on}|{self.num_kept}|{self.method}"


def conditions(
    domains: Sequence[str],
    *,
    num_experts: int,
    methods: Sequence[str],
    kept: Sequence[int],
    crossed: Sequence[int],
    elsewhere: int | None = None,
) -> list[Condition]:
    """Every row of a measurement: the full model, random experts, then module after module.

    Args:
        domains: names; a module goes on to the domains that follow its own, and around.
        num_experts: E.
        methods: those that look at calibration documents.
        kept: routed experts a layer of the sizes.
        crossed: of those, the sizes whose modules are also run on other domains.
        elsewhere: on how many others; None: on all.
    """

    def own(method: str, num_kept: int) -> list[Condition]:
        return [Condition(domain=d, evaluated_on=d, num_kept=num_kept, method=method) for d in domains]

    rows = own(FULL, num_experts)
    for num_kept in kept:
        rows += own(RANDOM, num_kept)
    others = len(domains) - 1 if elsewhere is None else min(elsewhere, len(domains) - 1)
    for place, domain in enumerate(domains):
        for method in methods:
            for num_kept in kept:
                texts = 1 + (others if num_kept in crossed else 0)
                rows += [
                    Condition(
                        domain=domain,
                        evaluated_on=domains[(place + step) % len(domains)],
                        num_kept=num_kept,
                        method=method,
                    )
                    for step in range(texts)
                ]
    return rows


def measure_retention(
    options: RetentionOptions, *, model: StudiedModel, read: Callable[[Path, Calibration], Documents]
) -> Path:
    """Measure every row that the options ask for and the file of rows does not hold.

    Args:
        options: of the command.
        model: the one in `options.checkpoint`; on several ranks all call alike and the first writes.
        read: the documents of a file.

    Returns:
        A JSON file of `Condition.key` -> domain, evaluated_on, method, keep_fraction (of routed experts),
        num_experts_kept (routed), loss (nats a token), tokens, and origin, which tells model and text apart. It may
        hold rows of earlier calls, too.

    Raises:
        ValueError: a size cannot be, documents cannot be read, the file holds rows of another model or text, or what
            is measured is not finite.
    """
    facts = model.facts
    kept = {size: parse_keep(size, facts) for size in options.keep}
    files = domain_files(options.data, options.held_out)
    rows = conditions(
        list(files),
        num_experts=facts.num_experts,
        methods=options.chosen_methods,
        kept=list(dict.fromkeys(kept.values())),
        crossed=[kept[size] for size in options.crossed],
        elsewhere=options.elsewhere,
    )
    calibration = {name: read(file.calibration, options.calibration) for name, file in files.items()}
    held_out = {name: read(file.held_out, options.held_out_calibration) for name, file in files.items()}
    modules = _Modules(options, model, calibration)
    origins = {row.key: _origin(row, options, model, calibration=calibration, held_out=held_out) for row in rows}
    done = model.from_writer(lambda: _read_done(options.rows_file, origins))
    missing = [row for row in rows if row.key not in done]
    for row in tqdm(missing, desc="retention", unit="row", disable=None if model.is_writer else True):
        loss = model.loss(held_out[row.evaluated_on].tokens, allowed_LE=modules.experts(row))
        done[row.key] = {
            "domain": row.domain,
            "evaluated_on": row.evaluated_on,
            "method": row.method,
            "keep_fraction": row.num_kept / facts.num_experts,
            "num_experts_kept": row.num_kept,
            "loss": loss.nats,
            "tokens": loss.num_tokens,
            "origin": origins[row.key],
        }
        if model.is_writer:
            with whole(options.rows_file) as unfinished:
                unfinished.write_text(to_json(done, indent=1), encoding="utf-8")
    return options.rows_file


def check_output(options: RetentionOptions) -> None:
    """Refuse an output that rows cannot be added to, before the model is loaded.

    Raises:
        ValueError: it is no folder, its rows cannot be read, or none can be written.
    """
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output must be a folder; {options.output} is a file")
    must_be_writable(options.rows_file)
    _rows_in(options.rows_file)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `measure_retention` has kept so far, none if there is no file."""
    return list(_rows_in(path).values())


class _Modules:
    """The experts of each module, chosen when they are asked for; statistics stay in files beside the rows."""

    def __init__(self, options: RetentionOptions, model: StudiedModel, calibration: Mapping[str, Documents]) -> None:
        self._options, self._model, self._calibration = options, model, calibration
        self._outputs = any(method in NEEDS_OUTPUTS for method in options.chosen_methods)
        self._stats: dict[str, ExpertStatistics] = {}
        self._chosen: dict[tuple[str, str, int], Tensor] = {}

    def experts(self, row: Condition) -> Tensor | None:
        """[L, E] bool of a row, None for all experts."""
        if row.method == FULL:
            return None
        # random experts are the same for every domain
        module = (row.method, "" if row.method == RANDOM else row.domain, row.num_kept)
        if module not in self._chosen:
            self._chosen[module] = self._choose(row)
        return self._chosen[module]

    def _choose(self, row: Condition) -> Tensor:
        facts = self._model.facts
        if row.method == RANDOM:
            return select_random(
                num_layers=len(facts.layers), num_experts=facts.num_experts, keep=row.num_kept, seed=self._options.seed
            )
        if row.method == LAYERWISE:
            return select_layerwise(self._model, self._calibration[row.domain], keep=row.num_kept)
        if row.domain not in self._stats:
            kind = "outputs.safetensors" if self._outputs else "safetensors"
            self._stats[row.domain] = collect_stats(
                self._model,
                self._calibration[row.domain],
                output=self._options.output / "stats" / f"{row.domain}.{kind}",
                outputs=self._outputs,
            )
        return select_by_stats(self._stats[row.domain], method=row.method, keep=row.num_kept)


def _origin(
    row: Condition,
    options: RetentionOptions,
    model: StudiedModel,
    *,
    calibration: Mapping[str, Documents],
    held_out: Mapping[str, Documents],
) -> str:
    """What the row's number depends on beside its key, as 16 hex digits."""
    facts = [
        # models that were fine-tuned apart may have the same routers
        str(options.checkpoint.resolve()),
        model.facts.fingerprint,
        str(options.seq_length),
        held_out[row.evaluated_on].source["sha256"],
    ]
    if model.setting.megatron:
        facts.append(model.setting.megatron)
    if row.method == RANDOM:
        facts.append(str(options.seed))
    elif row.method != FULL:
        facts.append(calibration[row.domain].source["sha256"])
    return hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()[:16]


def _read_done(path: Path, origins: Mapping[str, str]) -> dict[str, Any]:
    """Rows of earlier calls.

    Raises:
        ValueError: it is no such file, or a row that is asked for was measured on something else.
    """
    done = _rows_in(path)
    others = [key for key in origins.keys() & done.keys() if done[key]["origin"] != origins[key]]
    if others:
        raise ValueError(
            f"{path} holds rows of another model, other text, another seed or other --megatron flags "
            f"({sorted(others)[0]}); name another folder with --output"
        )
    return done


def _rows_in(path: Path) -> dict[str, Any]:
    """Key -> row of a file of rows, whatever they were measured on.

    Raises:
        ValueError: it is no such file, or a number in it is missing, no number or not finite; names the row.
    """
    if not path.exists():
        return {}
    try:
        rows = read_object(path, kind="a file of rows")
        for name, row in rows.items():
            where = f"{path}, {name}"
            share = checked(row, _KINDS, where=where, least=1)["keep_fraction"]
            if not 0 < share <= 1:
                raise ValueError(f"{where}: keep_fraction must lie in (0, 1]; got {share}")
    except ValueError as error:
        raise ValueError(f"{error}; remove it") from None
    return rows
