"""The numbers behind a retention curve: rows, their files, and their means.

A row is one evaluation: the experts of `model` that `method` chose for `domain`, evaluated on `evaluated_on`.
Losses are means over validation documents, in nats per token.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from emo_megatron.files import whole
from emo_megatron.finite import finite_number
from emo_megatron.json_files import checked, read_json, to_json

EMO = "emo"
STANDARD = "standard"
SMALL = "small"

FULL = "full"
CHOSEN = "mean_prob"
RANDOM = "random"

QUARTER = 1 / 4
NUMBERS = ("keep_fraction", "num_experts_kept", "loss", "loss_increase", "tokens", "seed")
"""Columns of a row that hold numbers."""
FIRST_NAME = "rise"
"""Name of the column loss_increase in files of earlier releases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionRow:
    """One evaluation of one subset of experts on one domain; raises ValueError for an impossible number."""

    model: str
    """emo, standard, small, or another name; small: a model trained from scratch with a module's number of experts."""
    domain: str
    """The domain whose calibration documents chose the experts; no meaning for the methods full and random."""
    evaluated_on: str
    """The domain of the validation documents."""
    keep_fraction: float
    """Share of the model's routed experts that are kept, in (0, 1]."""
    num_experts_kept: int
    """Routed experts kept per layer."""
    method: str
    """full: all experts. random: experts chosen at random. Otherwise a method of `select`, such as mean_prob."""
    loss: float
    """In nats per token."""
    loss_increase: float
    """`loss` minus the loss of the same model with all experts on `evaluated_on`, in nats per token."""
    tokens: int
    """Number of tokens over which `loss` is the mean."""
    seed: int
    """Seed of training; for the method random, also the seed of the choice."""
    versions: str
    """Versions of the software that produced the row, for people."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            finite_number(getattr(self, name), what=name)
        for name in ("num_experts_kept", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(
                f"keep_fraction must be in (0, 1]; got {self.keep_fraction}. Divide the routed experts "
                "kept by the routed experts of the full model."
            )

    @property
    def is_own(self) -> bool:
        """Whether the experts were chosen for the evaluated domain; always true for the methods full and random."""
        return self.method in (FULL, RANDOM) or self.domain == self.evaluated_on


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionSummary:
    """Means over all rows of one model, method and fraction. Every domain has the same weight."""

    model: str
    method: str
    keep_fraction: float
    num_experts_kept: int
    num_domains: int
    """Number of domains over which `loss` and `loss_increase` are means."""
    loss: float
    """Mean over domains, each with its own experts."""
    loss_increase: float
    """Mean over domains, each with its own experts."""
    loss_increase_on_others: float | None
    """Mean loss increase of a domain's experts on the other domains; None if not measured."""

    @property
    def selectivity(self) -> float | None:
        """Loss increase on other domains minus that on the own domain, in nats per token; None if not measured."""
        return None if self.loss_increase_on_others is None else self.loss_increase_on_others - self.loss_increase


def rows_of(measured: Iterable[Mapping[str, Any]], *, model: str, seed: int, versions: str) -> list[RetentionRow]:
    """Make the rows of a model from the evaluations of the command `retention`.

    Args:
        measured: evaluations, each with domain, evaluated_on, keep_fraction, num_experts_kept, method, loss and
            tokens. Other keys are ignored. Evaluations on a domain without the full model's loss are left out.
        model: name of the model.
        seed: seed of training or, for random experts, of the choice.
        versions: versions of the software that evaluated the model.
    """
    found = list(measured)
    full = {row["evaluated_on"]: row["loss"] for row in found if row["method"] == FULL}
    names = {f.name for f in fields(RetentionRow)}
    return [
        RetentionRow(
            model=model,
            loss_increase=row["loss"] - full[row["evaluated_on"]],
            seed=seed,
            versions=versions,
            **{name: value for name, value in row.items() if name in names},
        )
        for row in found
        if row["evaluated_on"] in full
    ]


def save_rows(rows: Sequence[RetentionRow], path: Path | str) -> tuple[Path, Path]:
    """Write rows as `path`.csv and `path`.json and return both paths; a failure leaves no partial file."""
    records = [asdict(row) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [f.name for f in fields(RetentionRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    base = Path(path)
    csv_path = base.with_name(base.name + ".csv")
    json_path = base.with_name(base.name + ".json")
    contents = {csv_path: text.getvalue(), json_path: to_json(records, indent=1) + "\n"}
    for file, content in contents.items():
        with whole(file) as unfinished:
            unfinished.write_text(content, encoding="utf-8", newline="")
    return csv_path, json_path


def load_rows(path: Path | str) -> list[RetentionRow]:
    """Read the rows of a file that `save_rows` wrote; the suffix (.csv or .json) decides the format."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"a file of rows must end in .csv or .json; got {path}. Add the suffix.")
    kinds = {f.name: f.type for f in fields(RetentionRow) if isinstance(f.type, type)}
    rows = []
    for place, record in enumerate(_records(path), start=1):
        where = f"{path}, row {place}"
        if isinstance(record, dict):
            record = with_present_names(record)
        if isinstance(record, dict) and set(record) != set(kinds):
            raise ValueError(
                f"{where} must have the columns {sorted(kinds)}; got {sorted(map(str, record))}. "
                "Write the file with save_rows."
            )
        if path.suffix == ".csv":
            record = {name: _cell(text, kinds[name]) for name, text in record.items()}
        values = checked(record, kinds, where=where)
        try:
            rows.append(RetentionRow(**values))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def with_present_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row as stored by this release or an earlier one, with the present names of columns."""
    is_old = FIRST_NAME in record and "loss_increase" not in record
    return {"loss_increase" if is_old and name == FIRST_NAME else name: value for name, value in record.items()}


def _cell(text: str | None, kind: type) -> object:
    """Convert a cell to the type of its column; return the text where the conversion fails."""
    # the row is too short
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        return text


def _records(path: Path) -> list[Any]:
    kind = "rows of `retention`"
    if path.suffix == ".json":
        stored = read_json(path, kind=kind)
        if not isinstance(stored, list):
            raise ValueError(f"{path} is not {kind}: the file must hold a list. Pass retention.json")
        return stored
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not {kind}: {error}") from None


def summarise(rows: Iterable[RetentionRow]) -> list[RetentionSummary]:
    """Average the rows of each (model, method, keep_fraction); per method, most experts come first."""
    groups: dict[tuple[str, str, float], list[RetentionRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.method, row.keep_fraction), []).append(row)
    summaries = []
    for (model, method, fraction), group in groups.items():
        own = [row for row in group if row.is_own]
        if not own:
            continue
        elsewhere = [row for row in group if not row.is_own]
        summaries.append(
            RetentionSummary(
                model=model,
                method=method,
                keep_fraction=fraction,
                num_experts_kept=own[0].num_experts_kept,
                num_domains=len({row.evaluated_on for row in own}),
                loss=_mean_over_pairs(own, "loss"),
                loss_increase=_mean_over_pairs(own, "loss_increase"),
                loss_increase_on_others=_mean_over_pairs(elsewhere, "loss_increase") if elsewhere else None,
            )
        )
    return sorted(summaries, key=lambda s: (s.model, s.method, -s.keep_fraction))


def find_summary(
    summaries: Iterable[RetentionSummary], *, model: str, method: str, keep_fraction: float = 1.0
) -> RetentionSummary | None:
    """The summary of one model, method and fraction; None if not measured."""
    for summary in summaries:
        is_wanted = summary.model == model and summary.method == method
        if is_wanted and math.isclose(summary.keep_fraction, keep_fraction):
            return summary
    return None


def _mean_over_pairs(rows: list[RetentionRow], column: str) -> float:
    """Mean over pairs (domain, evaluated_on), where each pair is first averaged over its seeds."""
    pairs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        # full and random experts were chosen for no domain: only the evaluated domain tells these rows apart
        domain = row.domain if row.method not in (FULL, RANDOM) else ""
        pairs.setdefault((domain, row.evaluated_on), []).append(getattr(row, column))
    return fmean(fmean(values) for values in pairs.values())
