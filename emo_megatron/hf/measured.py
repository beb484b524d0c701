"""What an evaluation measured of a model's modules, as far as a model card tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_megatron.json_files import checked, read_json

_KINDS = dict.fromkeys(("domain", "evaluated_on", "method"), str) | {"num_experts_kept": int, "loss": float}
"""Of a row."""


@dataclass(frozen=True, kw_only=True)
class MeasuredLoss:
    """A loss of a model that was limited to some of its experts, in nats a token.

    Attributes:
        text: the domain of the held-out text.
        chosen_for: the domain whose calibration text chose the experts.
        method: what chose them.
        kept: routed experts that ran.
        loss: with them.
        full_loss: with all experts on the same text.
        random_loss: with as many experts drawn at random; None if not measured.
    """

    text: str
    chosen_for: str
    method: str
    kept: int
    loss: float
    full_loss: float
    random_loss: float | None = None


def read_retention(path: Path, *, kept: int | None = None, chosen_for: str | None = None) -> list[MeasuredLoss]:
    """The rows of an evaluation that say what a module retains, or what modules of a model do.

    Args:
        path: JSON, rows or an object of rows with domain, evaluated_on, method, num_experts_kept and loss; method is
            full, random or what chose the experts for the domain.
        kept: routed experts of a module; None: any number.
        chosen_for: the domain of a module: its rows on every text, its own first; None: every domain on its own text.

    Raises:
        ValueError: it is no such file, has no such row, or a number in it is no number or not finite.
    """
    rows = _read(path)
    full, random = (
        {(r["evaluated_on"], r["num_experts_kept"]): r["loss"] for r in rows if r["method"] == m}
        for m in ("full", "random")
    )
    full_losses = {text: float(loss) for (text, _), loss in full.items()}
    found = [
        MeasuredLoss(
            text=row["evaluated_on"],
            chosen_for=row["domain"],
            method=row["method"],
            kept=row["num_experts_kept"],
            loss=float(row["loss"]),
            full_loss=full_losses[row["evaluated_on"]],
            random_loss=random.get((row["evaluated_on"], row["num_experts_kept"])),
        )
        for row in rows
        if row["method"] not in ("full", "random")
        and row["domain"] == (chosen_for or row["evaluated_on"])
        and row["evaluated_on"] in full_losses
        and kept in (None, row["num_experts_kept"])
    ]
    if not found:
        experts = "" if kept is None else f" of {kept} routed experts"
        domains = ", ".join(sorted({row["domain"] for row in rows}))
        raise ValueError(
            f"--retention {path} has no row of a module{experts} for {chosen_for or 'any domain'} beside the full "
            f"model's; it has {domains}. Evaluate the parent so, or name the domain with --retention-domain."
        )
    return sorted(found, key=lambda row: row.text != row.chosen_for)


def measured_domains(path: Path) -> set[str]:
    """The domains that the rows of an evaluation chose experts for."""
    return {row["domain"] for row in _read(path)}


def _read(path: Path) -> list[dict[str, Any]]:
    where = f"--retention {path}"
    rows = read_json(path, kind="rows of an evaluation (--retention)")
    if isinstance(rows, list):
        rows = {f"row {place}": row for place, row in enumerate(rows, start=1)}
    if not isinstance(rows, dict):
        raise ValueError(f"{where} must hold rows with {', '.join(_KINDS)}")
    return [checked(row, _KINDS, where=f"{where}, {name}", least=1) for name, row in rows.items()]
