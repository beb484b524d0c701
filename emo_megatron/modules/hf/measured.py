"""What an evaluation measured of a model's modules, as far as a model card tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MeasuredLoss:
    """A measured loss, in nats a token.

    Attributes:
        domain: whose held-out text; the module's experts were chosen on its calibration text.
        method: what chose them.
        kept: routed experts that ran.
        loss: the module's.
        full_loss: the loss with all experts on the same text.
        random_loss: the loss with as many experts drawn at random; None if not measured.
    """

    domain: str
    method: str
    kept: int
    loss: float
    full_loss: float
    random_loss: float | None = None


def read_retention(path: Path, *, kept: int | None) -> list[MeasuredLoss]:
    """The rows of an evaluation that say what a module retains.

    Args:
        path: JSON, rows or an object of rows with domain, evaluated_on, method, num_experts_kept and loss; method is
            full, random or what chose the experts.
        kept: routed experts of the module; None: any number.

    Raises:
        ValueError: it is no such file, or has no row for this number of experts.
    """
    rows = _read(path)
    full, random = (
        {
            (row["evaluated_on"], row["num_experts_kept"]): float(row["loss"])
            for row in rows
            if row["method"] == method
        }
        for method in ("full", "random")
    )
    full_losses = {domain: loss for (domain, _), loss in full.items()}
    found = [
        MeasuredLoss(
            domain=row["domain"],
            method=row["method"],
            kept=row["num_experts_kept"],
            loss=float(row["loss"]),
            full_loss=full_losses[row["domain"]],
            random_loss=random.get((row["domain"], row["num_experts_kept"])),
        )
        for row in rows
        if row["method"] not in ("full", "random")
        and row["domain"] == row["evaluated_on"]
        and row["domain"] in full_losses
        and kept in (None, row["num_experts_kept"])
    ]
    if not found:
        wanted = "of modules" if kept is None else f"of modules of {kept} routed experts"
        raise ValueError(
            f"{path} has no rows {wanted} beside the full model's; evaluate the parent with such modules first"
        )
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--retention {path} is not readable JSON: {error}") from None
    rows = list(stored.values()) if isinstance(stored, dict) else stored
    fields = ("domain", "evaluated_on", "method", "num_experts_kept", "loss")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(field in row for field in fields) for row in rows
    ):
        raise ValueError(f"--retention {path} must hold rows with {', '.join(fields)}")
    return rows
