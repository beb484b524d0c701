"""The numbers behind a retention curve: rows of single evaluations, their files, their means.

Losses are means in nats per token on validation text. A row is one evaluation: the experts of `model`
that `method` chose for `domain`, measured on `evaluated_on`.
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
"""Columns of a row that are numbers."""
FIRST_NAME = "rise"
"""Name of the column loss_increase in files of earlier releases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionRow:
    """One evaluation of one subset of experts on one domain; ValueError where a number of it cannot be."""

    model: str
    """emo, standard, or small: trained from scratch with as few experts as a module has."""
    domain: str
    """Whose calibration text chose the experts; without meaning for methods full and random."""
    evaluated_on: str
    """The domain of the validation text."""
    keep_fraction: float
    """Share of the model's own experts that stay, in (0, 1]."""
    num_experts_kept: int
    """Experts that stay, a layer."""
    method: str
    """full: all experts. mean_prob: the likeliest on the domain's calibration text. random."""
    loss: float
    """Nats a token."""
    loss_increase: float
    """Nats a token over the same model's full loss on `evaluated_on`."""
    tokens: int
    """Tokens behind `loss`."""
    seed: int
    """Of training, and of the choice where it is random."""
    versions: str
    """What produced the row, for people."""

    def __post_init__(self) -> None:
        for name in NUMBERS:
            finite_number(getattr(self, name), what=name)
        for name in ("num_experts_kept", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(
                f"keep_fraction must lie in (0, 1]; got {self.keep_fraction}. Divide the experts "
                "kept by the experts of the full model."
            )

    @property
    def is_own(self) -> bool:
        """Whether the experts are meant for the text: any text, unless chosen for a domain."""
        return self.method in (FULL, RANDOM) or self.domain == self.evaluated_on


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionSummary:
    """All rows of one model, method and fraction. Every domain counts the same."""

    model: str
    method: str
    keep_fraction: float
    num_experts_kept: int
    num_domains: int
    """Domains behind `loss` and `rise`."""
    loss: float
    """Mean over domains, each with its own experts."""
    loss_increase: float
    """Mean over domains, each with its own experts."""
    loss_increase_on_others: float | None
    """Mean rise of a domain's experts on the other domains; None if that was not measured."""

    @property
    def selectivity(self) -> float | None:
        """How many nats a token more a domain's experts cost on other domains than on their own."""
        return None if self.loss_increase_on_others is None else self.loss_increase_on_others - self.loss_increase


def rows_of(measured: Iterable[Mapping[str, Any]], *, model: str, seed: int, versions: str) -> list[RetentionRow]:
    """The rows of a model from what the command retention measured of it.

    Args:
        measured: domain, evaluated_on, keep_fraction, num_experts_kept, method, loss and tokens of each; more is
            left out, and so are texts without the full model's loss.
        model: its name.
        seed: of training or, for random experts, of their choice.
        versions: what measured it.
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
    """Write rows as `path`.csv and `path`.json, each file whole or not at all; returns both paths."""
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
    """Read the rows of one of the files that `save_rows` wrote; the suffix says which form it has."""
    path = Path(path)
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"rows are read from .csv or .json; got {path}. Add the suffix.")
    kinds = {f.name: f.type for f in fields(RetentionRow) if isinstance(f.type, type)}
    rows = []
    for place, record in enumerate(_records(path), start=1):
        where = f"{path}, row {place}"
        if isinstance(record, dict) and FIRST_NAME in record and "loss_increase" not in record:
            record = {"loss_increase" if name == FIRST_NAME else name: value for name, value in record.items()}
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


def _cell(text: str | None, kind: type) -> object:
    """A cell as the type that its column has, or its text where that is of another."""
    # of a row that is too short
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
            raise ValueError(f"{path} is not {kind}: it must hold a list; name retention.json")
        return stored
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not {kind}: {error}") from None


def summarise(rows: Iterable[RetentionRow]) -> list[RetentionSummary]:
    """Average the rows of each (model, method, keep_fraction); most experts come first."""
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
    """The summary of one model, method and fraction, if it was measured."""
    for summary in summaries:
        is_wanted = summary.model == model and summary.method == method
        if is_wanted and math.isclose(summary.keep_fraction, keep_fraction):
            return summary
    return None


def _mean_over_pairs(rows: list[RetentionRow], column: str) -> float:
    """Mean over (domain, evaluated_on), however many seeds each was measured with."""
    pairs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        # experts that were chosen for no domain are told apart by the text alone
        domain = row.domain if row.method not in (FULL, RANDOM) else ""
        pairs.setdefault((domain, row.evaluated_on), []).append(getattr(row, column))
    return fmean(fmean(values) for values in pairs.values())
