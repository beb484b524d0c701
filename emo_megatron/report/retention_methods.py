"""Methods of choosing experts side by side: a table by model, size and method, and the cliff of each.

The cliff is the smallest number of experts, counted down from all of them, whose loss stays within a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emo_megatron.experts.select import METHODS, MaxRise
from emo_megatron.report.cells import MISSING, share, signed, text_table
from emo_megatron.report.retention_rows import FULL, RANDOM, RetentionRow, RetentionSummary, find_summary, summarise

HEADINGS = (
    ("", "model"),
    ("experts", "kept"),
    ("", "method"),
    ("loss,", "nats a token"),
    ("", "rise"),
    ("random", "experts"),
    ("selec-", "tivity"),
)
CLIFF_HEADINGS = (
    ("", "model"),
    ("", "method"),
    ("", "domain"),
    ("experts", "kept"),
    ("loss,", "nats a token"),
    ("", "rise"),
)
MEAN = "all, on average"
"""Stands for a domain in the table of cliffs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cliff:
    """How few experts a model can keep by one method within a bound, among the sizes that were measured."""

    model: str
    method: str
    domain: str | None
    """None: the mean of all domains, each with its own experts."""
    num_experts_kept: int
    """Routed experts a layer; all of them where even the largest module is out of bounds."""
    keep_fraction: float
    loss: float
    """Nats a token."""
    rise: float
    """Nats a token."""
    is_smallest_measured: bool
    """No smaller module was measured, so that the cliff may lie below."""


def find_cliffs(rows: Iterable[RetentionRow], bound: MaxRise) -> list[Cliff]:
    """The cliff of every model and method, on average and for every domain.

    Args:
        rows: those of a model without its full rows are left out.
        bound: what a module may lose against the same model with all experts.
    """
    rows = list(rows)
    domains = list(dict.fromkeys(row.domain for row in rows))
    found = []
    for domain in [None, *domains] if len(domains) > 1 else domains:
        summaries = summarise(row for row in rows if domain in (None, row.domain))
        for model, method in sorted({(s.model, s.method) for s in summaries}, key=_method_place):
            full = find_summary(summaries, model=model, method=FULL)
            if full is None or method == FULL:
                continue
            sizes = [s for s in summaries if (s.model, s.method) == (model, method)]
            found.append(_cliff(full, sizes, method=method, domain=domain, bound=bound))
    return found


def _cliff(
    full: RetentionSummary, sizes: list[RetentionSummary], *, method: str, domain: str | None, bound: MaxRise
) -> Cliff:
    """Sizes come with most experts first."""
    within = full
    for size in sizes:
        if size.loss > bound.highest(full.loss):
            break
        within = size
    return Cliff(
        model=full.model,
        method=method,
        domain=domain,
        num_experts_kept=within.num_experts_kept,
        keep_fraction=within.keep_fraction,
        loss=within.loss,
        rise=within.rise,
        is_smallest_measured=within is sizes[-1],
    )


def methods_table(rows: Iterable[RetentionRow]) -> str:
    """A line for each model, size and method: means over domains, each with its own experts.

    Random experts, as many, stand in every line: a rise tells little without them.
    """
    summaries = summarise(rows)
    lines = []
    for summary in sorted(summaries, key=_place):
        by_chance = find_summary(summaries, model=summary.model, method=RANDOM, keep_fraction=summary.keep_fraction)
        if summary.method == RANDOM and any(
            s.method not in (FULL, RANDOM) and s.keep_fraction == summary.keep_fraction
            for s in summaries
            if s.model == summary.model
        ):
            continue
        is_full = summary.method == FULL
        lines.append(
            (
                summary.model,
                f"{summary.num_experts_kept} ({share(summary.keep_fraction)})",
                MISSING if is_full else summary.method,
                f"{summary.loss:.3f}",
                MISSING if is_full else signed(summary.rise),
                f"{by_chance.loss:.3f} ({signed(by_chance.rise)})" if by_chance else MISSING,
                MISSING if summary.selectivity is None else signed(summary.selectivity),
            )
        )
    return text_table(HEADINGS, lines)


def _place(summary: RetentionSummary) -> tuple[str, float, int]:
    model, rank = _method_place((summary.model, summary.method))
    return model, -summary.keep_fraction, rank


def _method_place(pair: tuple[str, str]) -> tuple[str, int]:
    """Models by name, methods in the order in which `select` lists them."""
    model, method = pair
    return model, list(METHODS).index(method) if method in METHODS else -1


def cliffs_table(cliffs: Sequence[Cliff], bound: MaxRise) -> str:
    """A line for each cliff, below the bound in words."""
    limit = f"{bound.value:.1%} of the loss" if bound.is_share else f"{bound.value:g} nats a token"
    lines = [
        (
            cliff.model,
            cliff.method,
            MEAN if cliff.domain is None else cliff.domain,
            f"{cliff.num_experts_kept} ({share(cliff.keep_fraction)})"
            + (" or fewer" if cliff.is_smallest_measured else ""),
            f"{cliff.loss:.3f}",
            signed(cliff.rise),
        )
        for cliff in cliffs
    ]
    return f"Fewest experts within {limit}:\n\n" + text_table(CLIFF_HEADINGS, lines)


def full_report(rows: Sequence[RetentionRow], bound: MaxRise) -> str:
    """Everything: means, cliffs, and the table of every domain."""
    parts = [methods_table(rows), cliffs_table(find_cliffs(rows, bound), bound)]
    domains = list(dict.fromkeys(row.domain for row in rows))
    if len(domains) > 1:
        for domain in domains:
            own = methods_table(row for row in rows if row.domain == domain)
            parts.append(f"Domain {domain}:\n\n{own}")
    return "\n\n\n".join(parts) + "\n"
