"""Rows of a retention measurement that are made up."""

from __future__ import annotations

from emo_megatron.report.rows import RetentionRow

FULL_LOSS = {"emo": 3.0, "standard": 3.0, "small": 3.5}
EXPERTS = 32


def row(
    model: str,
    method: str,
    keep_fraction: float,
    loss_increase: float,
    *,
    domain: str = "a",
    evaluated_on: str | None = None,
    seed: int = 0,
    full_loss: float | None = None,
) -> RetentionRow:
    full = FULL_LOSS[model] if full_loss is None else full_loss
    return RetentionRow(
        model=model,
        domain=domain,
        evaluated_on=domain if evaluated_on is None else evaluated_on,
        keep_fraction=keep_fraction,
        num_experts_kept=round((8 if model == "small" else EXPERTS) * keep_fraction),
        method=method,
        loss=full + loss_increase,
        loss_increase=loss_increase,
        tokens=1000,
        seed=seed,
        versions="torch 2.14, test",
    )
