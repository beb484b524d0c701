"""The bounds of the comparison at a GPU's size, and whether the results keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fidelity_results import MODELS, Result, condition
from timing import markdown_table

from demo.intervals import mean_of, paired
from emo_megatron.report.rows import CHOSEN, EMO, FULL, QUARTER, SMALL, STANDARD, find_summary, summarise
from emo_megatron.report.table import signed


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What the comparison should show."""

    gap: float = 0.02
    """EMO's loss with all experts minus the standard MoE's, in nats per token: at most this."""
    increase_ratio: float = 0.2
    """EMO's loss increase with a quarter of the experts, divided by the standard MoE's: at most this."""
    quarter_gap: float = 0.0
    """Loss of EMO's quarter minus the small model's, in nats per token: less than this."""


# These values were fixed before any run on a GPU. A result must never change them.
BOUNDS = Bounds()


def bounds_part(together: Mapping[str, Result]) -> str:
    """The bounds in Markdown, with their outcome if all three models are there and have been measured.

    Args:
        together: model -> its result, for models that may be compared.
    """
    found = _outcomes(together) if together.keys() >= set(MODELS) else None
    rows = [
        ["gap of the full model, EMO minus standard", f"at most {signed(BOUNDS.gap)}"],
        ["loss increase at a quarter, EMO divided by standard", f"at most {BOUNDS.increase_ratio:g}"],
        ["EMO's quarter minus the small model", f"below {BOUNDS.quarter_gap:g}"],
    ]
    if found is None:
        missing = [model for model in MODELS if model not in together]
        reason = f"results of {', '.join(missing)} are missing" if missing else "not every model is measured yet"
        outcomes = [("-", f"not judged: {reason}")] * len(rows)
    else:
        outcomes = found
    table = markdown_table(
        ["measured", "bound", "result", "outcome"],
        [[*row, *outcome] for row, outcome in zip(rows, outcomes, strict=True)],
    )
    return f"Fixed before any run on a GPU. Results of quick runs are not meaningful.\n\n{table}"


def full_condition(result: Result) -> str:
    """The condition with all experts."""
    experts = next(row.num_experts_kept for row in result.rows if row.method == FULL)
    return condition(FULL, experts)


def quarter_condition(result: Result) -> str | None:
    """The condition with a quarter of the experts, chosen for the domain; None if it is not measured."""
    kept = next((row.num_experts_kept for row in result.rows if row.keep_fraction == QUARTER), None)
    return None if kept is None or condition(CHOSEN, kept) not in result.nats else condition(CHOSEN, kept)


def _outcomes(together: Mapping[str, Result]) -> list[tuple[str, str]] | None:
    """Result and outcome of every bound; None if a quarter is not measured."""
    emo, standard, small = (together[model] for model in (EMO, STANDARD, SMALL))
    quarter = quarter_condition(emo)
    increases = [_increase(result) for result in (emo, standard)]
    if quarter is None or None in increases or not (emo.nats and standard.nats and small.nats):
        return None
    tokens = emo.document_tokens
    gap = mean_of(paired(emo.nats[full_condition(emo)], standard.nats[full_condition(standard)], tokens))
    behind = mean_of(paired(emo.nats[quarter], small.nats[full_condition(small)], tokens))
    first, second = (float(increase or 0.0) for increase in increases)
    ratio = first / second if second > 0 else math.inf
    ratio_text = f"{ratio:.2f}" if second > 0 else "no ratio"
    return [
        (str(gap), _outcome(gap.nats <= BOUNDS.gap)),
        (f"{ratio_text} ({signed(first)} and {signed(second)})", _outcome(ratio <= BOUNDS.increase_ratio)),
        (str(behind), _outcome(behind.nats < BOUNDS.quarter_gap)),
    ]


def _increase(result: Result) -> float | None:
    """Mean loss increase over the domains with a quarter of the experts."""
    found = find_summary(summarise(result.rows), model=result.model, method=CHOSEN, keep_fraction=QUARTER)
    return None if found is None else found.loss_increase


def _outcome(is_kept: bool) -> str:
    return "holds" if is_kept else "**does not hold**"
