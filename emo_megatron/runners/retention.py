"""Loss of a model that keeps only some of its experts: one loss per domain, method and number of experts.

Shapes: L MoE layers in model order, E routed experts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.select import LAYERWISE, METHODS, RANDOM, select_by_stats, select_random
from emo_megatron.experts.stats import ExpertStatistics
from emo_megatron.report.rows import FULL
from emo_megatron.runners.cache import CachedRunner
from emo_megatron.runners.search import select_layerwise

SUFFIXES = (".jsonl", ".safetensors", ".idx")
"""Suffixes of files with documents; every .idx file needs a .bin file of the same name."""


def domain_files(data: Path, validation_data: Path) -> dict[str, tuple[Path, Path]]:
    """Map from the name of a domain to its files of calibration and of validation documents, sorted by name.

    A domain has the name of its calibration file.

    Args:
        data: a file, the prefix of an indexed dataset, or a folder of files and datasets.
        validation_data: of the same kind as `data`; files in a folder must have the same names as in `data`.
    """
    if data.is_dir() != validation_data.is_dir():
        raise ValueError(
            f"--data and --validation-data must be two files or two folders; got {data} and {validation_data}"
        )
    if not data.is_dir():
        return {data.stem: (data, validation_data)}
    files, others = _in_folder(data), _in_folder(validation_data)
    if files.keys() != others.keys():
        raise ValueError(
            f"--data and --validation-data must hold files of the same names; only one of {data} and {validation_data} "
            f"has {', '.join(sorted(files.keys() ^ others.keys()))}"
        )
    return {name: (files[name], others[name]) for name in sorted(files)}


def _in_folder(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES:
            continue
        if path.stem in found:
            raise ValueError(f"{folder} holds two files of the domain {path.stem}; move one away")
        # an indexed dataset is named by its path without suffix
        found[path.stem] = path.with_suffix("") if path.suffix == ".idx" else path
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(SUFFIXES[:2])} or indexed dataset")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One row to measure."""

    domain: str
    """The domain whose calibration documents choose the experts."""
    evaluated_on: str
    """The domain of the validation documents."""
    num_kept: int
    """Routed experts kept per layer."""
    method: str


def conditions(
    domains: Sequence[str],
    *,
    num_experts: int,
    methods: Sequence[str],
    kept: Sequence[int],
    crossed: Sequence[int],
    num_other_domains: int | None = None,
) -> list[Condition]:
    """All rows of a measurement, in order: the full model, random experts, then one module after the other.

    Args:
        domains: names of the domains; a module's other domains are the next ones in this list, cyclically.
        num_experts: E.
        methods: the methods that use calibration documents.
        kept: the sizes, in routed experts per layer.
        crossed: the sizes in `kept` whose modules are also evaluated on other domains.
        num_other_domains: number of other domains per such module; None: all.
    """

    def own(method: str, num_kept: int) -> list[Condition]:
        return [Condition(domain=d, evaluated_on=d, num_kept=num_kept, method=method) for d in domains]

    rows = own(FULL, num_experts)
    for num_kept in kept:
        rows += own(RANDOM, num_kept)
    others = len(domains) - 1 if num_other_domains is None else min(num_other_domains, len(domains) - 1)
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


def measure_rows(
    model: CachedRunner,
    rows: Sequence[Condition],
    *,
    calibration: Mapping[str, Documents],
    validation_data: Mapping[str, Documents],
    seed: int,
) -> list[dict[str, Any]]:
    """Measure rows. All ranks must make the same call.

    Args:
        model: the runner of the model.
        rows: the rows, see `conditions`.
        calibration: per domain, the documents that choose experts.
        validation_data: per domain, the documents on which the loss is measured.
        seed: seed of random experts.

    Returns:
        Per row: domain, evaluated_on, method, keep_fraction (of routed experts), num_experts_kept (routed experts),
        loss (nats per token) and tokens.
    """
    total = model.metadata.num_experts
    outputs = any(METHODS[row.method].needs_outputs for row in rows if row.method != FULL)

    @functools.cache
    def statistics(domain: str) -> ExpertStatistics:
        return model.statistics(calibration[domain], outputs=outputs)

    @functools.cache
    def experts(domain: str, method: str, keep: int) -> Tensor | None:
        """[L, E] bool; None: all."""
        if method == FULL:
            return None
        if method == RANDOM:
            return select_random(num_layers=len(model.metadata.layers), num_experts=total, keep=keep, seed=seed)
        if method == LAYERWISE:
            return select_layerwise(model, calibration[domain], keep=keep)
        return select_by_stats(statistics(domain), method=method, keep=keep)

    measured = []
    for row in tqdm(rows, desc="retention", unit="row", disable=None if model.is_writer else True):
        loss = model.loss(validation_data[row.evaluated_on], allowed_LE=experts(row.domain, row.method, row.num_kept))
        measured.append(
            {
                "domain": row.domain,
                "evaluated_on": row.evaluated_on,
                "method": row.method,
                "keep_fraction": row.num_kept / total,
                "num_experts_kept": row.num_kept,
                "loss": loss.nats,
                "tokens": loss.num_tokens,
            }
        )
    return measured
