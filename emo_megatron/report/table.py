"""Tables of retention: every method by model and size, and the smallest size within a bound for every method.

The smallest size within the bound: going from all experts down, the last size before the loss exceeds the bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from emo_megatron.experts.select import METHODS, MaxLossIncrease
from emo_megatron.report.rows import FULL, RANDOM, RetentionRow, RetentionSummary, find_summary, summarise

MISSING = "-"
KEPT, LOSS, INCREASE = ("experts", "kept"), ("loss, nats", "per token"), ("loss", "increase")
HEADINGS = (("", "model"), KEPT, ("", "method"), LOSS, INCREASE, ("random", "experts"), ("selec-", "tivity"))
SMALLEST_HEADINGS = (("", "model"), ("", "method"), ("", "domain"), KEPT, LOSS, INCREASE)
MEAN = "all, on average"
"""Cell of the column `domain` for the mean over domains, in the table of smallest sizes."""


def signed(nats: float) -> str:
    """Three decimals and a sign; a number that rounds to zero has a plus sign."""
    return f"{round(nats, 3) + 0.0:+.3f}"


def share(fraction: float) -> str:
    """A fraction of the experts as text, such as 1/4; "all" for 1."""
    return "all" if fraction == 1.0 else str(Fraction(fraction).limit_denominator(256))


def text_table(headings: Sequence[Sequence[str]], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table with right-aligned cells and a rule below the headings.

    Args:
        headings: per column, the lines of its heading; every column has the same number of lines.
        lines: lines of the table; each holds one cell per column.
    """
    above = [list(line) for line in zip(*headings, strict=True)]
    rows = [*above, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["   ".join(map(str.rjust, cells, widths)).rstrip() for cells in rows]
    text.insert(len(above), "-" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(text)


@dataclass(frozen=True, slots=True)
class SmallestSize:
    """The smallest measured size within the bound, for one model and one method."""

    model: str
    method: str
    domain: str | None
    """None: the mean of all domains, each with its own experts."""
    size: RetentionSummary
    """Experts kept, loss and loss increase; all experts if every measured module exceeds the bound."""
    is_smallest_measured: bool
    """Whether no smaller size was measured; a smaller size may be within the bound too."""


def find_smallest_sizes(rows: Iterable[RetentionRow], bound: MaxLossIncrease) -> list[SmallestSize]:
    """The smallest size within the bound for every model and method: for the mean over domains and for every domain.

    Args:
        rows: rows to compare; rows of a model without rows of the method full are left out.
        bound: largest loss increase allowed, against the same model with all experts.
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
            within = full
            # most experts come first
            for size in sizes:
                if size.loss > bound.highest(full.loss):
                    break
                within = size
            found.append(SmallestSize(model, method, domain, within, is_smallest_measured=within is sizes[-1]))
    return found


def methods_table(rows: Iterable[RetentionRow]) -> str:
    """One line per model, size and method: means over domains, each domain with its own experts.

    Every line also shows the same number of random experts, because a loss increase means little without a baseline.
    """
    summaries = summarise(rows)
    chosen = {(s.model, s.keep_fraction) for s in summaries if s.method not in (FULL, RANDOM)}
    lines = []
    for summary in sorted(summaries, key=_place):
        # random experts have their own line only where no other method was measured at this size
        if summary.method == RANDOM and (summary.model, summary.keep_fraction) in chosen:
            continue
        by_chance = find_summary(summaries, model=summary.model, method=RANDOM, keep_fraction=summary.keep_fraction)
        is_full = summary.method == FULL
        lines.append(
            (
                summary.model,
                kept(summary),
                MISSING if is_full else summary.method,
                f"{summary.loss:.3f}",
                MISSING if is_full else signed(summary.loss_increase),
                f"{by_chance.loss:.3f} ({signed(by_chance.loss_increase)})" if by_chance else MISSING,
                MISSING if summary.selectivity is None else signed(summary.selectivity),
            )
        )
    return text_table(HEADINGS, lines)


def kept(summary: RetentionSummary) -> str:
    """Number of experts kept, and their share."""
    return f"{summary.num_experts_kept} ({share(summary.keep_fraction)})"


def _place(summary: RetentionSummary) -> tuple[str, float, int]:
    model, rank = _method_place((summary.model, summary.method))
    return model, -summary.keep_fraction, rank


def _method_place(pair: tuple[str, str]) -> tuple[str, int]:
    """Models by name, methods in the order in which `select` lists them."""
    model, method = pair
    return model, list(METHODS).index(method) if method in METHODS else -1


def smallest_sizes_table(sizes: Sequence[SmallestSize], bound: MaxLossIncrease) -> str:
    """A heading that names the bound, and one line per model, method and domain."""
    limit = f"{bound.value:.1%} of the loss" if bound.is_share else f"{bound.value:g} nats per token"
    lines = [
        (
            found.model,
            found.method,
            MEAN if found.domain is None else found.domain,
            kept(found.size) + (" or fewer" if found.is_smallest_measured else ""),
            f"{found.size.loss:.3f}",
            signed(found.size.loss_increase),
        )
        for found in sizes
    ]
    return f"Fewest experts within {limit}:\n\n" + text_table(SMALLEST_HEADINGS, lines)


def full_report(rows: Sequence[RetentionRow], bound: MaxLossIncrease) -> str:
    """All tables: means over domains, smallest sizes, and the table of every domain."""
    parts = [methods_table(rows), smallest_sizes_table(find_smallest_sizes(rows, bound), bound)]
    domains = list(dict.fromkeys(row.domain for row in rows))
    if len(domains) > 1:
        for domain in domains:
            own = methods_table(row for row in rows if row.domain == domain)
            parts.append(f"Domain {domain}:\n\n{own}")
    return "\n\n\n".join(parts) + "\n"
