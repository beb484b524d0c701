"""What a model loses when only some of its experts are kept: the findings, a table and a figure.

Everything starts from rows, one evaluation each, and leaves out what was not measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emo_megatron.report.cells import MISSING, share, signed, text_table
from emo_megatron.report.retention_figure import plot_retention
from emo_megatron.report.retention_rows import (
    CHOSEN,
    EMO,
    FULL,
    QUARTER,
    RANDOM,
    SMALL,
    STANDARD,
    RetentionRow,
    RetentionSummary,
    find_summary,
    load_rows,
    rows_of,
    save_rows,
    summarise,
)

__all__ = [
    "Finding",
    "RetentionRow",
    "RetentionSummary",
    "findings",
    "load_rows",
    "plot_retention",
    "rows_of",
    "save_rows",
    "summarise",
    "table",
]

EIGHTH = 1 / 8
HOW_TO_READ = """\
Loss in nats a token on held-out text, lower is better, averaged over domains that each keep the
experts they use most; in brackets what dropping the others costs. Selectivity: how much more the
kept experts cost on other domains than on their own."""
HEADINGS = (
    ("experts", "kept"),
    ("", "EMO"),
    ("standard", "MoE"),
    ("small MoE", "from scratch"),
    ("EMO, random", "experts"),
    ("", "selectivity"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A statement about the measured numbers, and whether they bear it out."""

    name: str
    """Short and stable, for scripts."""
    value: float
    """In nats a token."""
    bound: float
    """What `value` is compared with, in nats a token."""
    holds: bool
    text: str
    """The statement with its numbers, for people; it says what must hold, true or not."""


def findings(rows: Iterable[RetentionRow]) -> list[Finding]:
    """Check what the method promises. A statement whose numbers were not measured is left out."""
    summaries = summarise(rows)

    def find(model: str, method: str, keep_fraction: float = 1.0) -> RetentionSummary | None:
        return find_summary(summaries, model=model, method=method, keep_fraction=keep_fraction)

    emo_full, standard_full = find(EMO, FULL), find(STANDARD, FULL)
    emo, standard = find(EMO, CHOSEN, QUARTER), find(STANDARD, CHOSEN, QUARTER)
    emo_eighth, standard_eighth = find(EMO, CHOSEN, EIGHTH), find(STANDARD, CHOSEN, EIGHTH)
    small, by_chance = find(SMALL, FULL), find(EMO, RANDOM, QUARTER)
    found = []
    if emo and standard:
        found.append(_rise_against_standard(emo, standard, name="quarter_rise", part=5))
    if emo_eighth and standard_eighth:
        found.append(_rise_against_standard(emo_eighth, standard_eighth, name="eighth_rise", part=4))
    if emo and small:
        found.append(_quarter_beats_small(emo, small))
    if emo and by_chance:
        found.append(_choice_matters(emo, by_chance))
    if emo and emo.selectivity is not None:
        found.append(_quarter_is_selective(emo.selectivity))
    if emo_full and standard_full:
        found.append(_full_models_match(emo_full, standard_full))
    return found


def _rise_against_standard(emo: RetentionSummary, standard: RetentionSummary, *, name: str, part: int) -> Finding:
    # a standard MoE that loses nothing leaves EMO nothing to lose
    bound = max(standard.rise, 0.0) / part
    return Finding(
        name=name,
        value=emo.rise,
        bound=bound,
        holds=emo.rise <= bound,
        text=f"With 1/{round(1 / emo.keep_fraction)} of the experts EMO loses at most 1/{part} of "
        f"what the standard MoE loses: {signed(emo.rise)} against {signed(standard.rise)} nats a token.",
    )


def _quarter_beats_small(emo: RetentionSummary, small: RetentionSummary) -> Finding:
    return Finding(
        name="quarter_beats_small",
        value=emo.loss,
        bound=small.loss,
        holds=emo.loss < small.loss,
        text="A quarter of EMO's experts is better than a model of that size trained from scratch: "
        f"loss {emo.loss:.3f} against {small.loss:.3f}.",
    )


def _choice_matters(emo: RetentionSummary, by_chance: RetentionSummary) -> Finding:
    bound = 3 * max(emo.rise, 0.0)
    return Finding(
        name="choice_matters",
        value=by_chance.rise,
        bound=bound,
        holds=by_chance.rise >= bound,
        text="A random quarter of EMO's experts loses at least 3 times what a chosen quarter does: "
        f"{signed(by_chance.rise)} against {signed(emo.rise)} nats a token.",
    )


def _quarter_is_selective(selectivity: float) -> Finding:
    bound = 0.3
    return Finding(
        name="quarter_is_selective",
        value=selectivity,
        bound=bound,
        holds=selectivity > bound,
        text="A domain's quarter of EMO costs other domains over "
        f"{bound:g} nats a token more than its own: {signed(selectivity)}.",
    )


def _full_models_match(emo: RetentionSummary, standard: RetentionSummary) -> Finding:
    bound, gap = 0.06, emo.loss - standard.loss
    return Finding(
        name="full_models_match",
        value=gap,
        bound=bound,
        holds=gap <= bound,
        text=f"With all experts EMO is at most {bound:g} nats a token worse than the standard MoE: "
        f"{signed(gap)} ({emo.loss:.3f} against {standard.loss:.3f}).",
    )


def table(rows: Iterable[RetentionRow]) -> str:
    """Lay the means out as text with a line for each number of experts kept, and how to read it."""
    summaries = summarise(rows)
    lines = [_cells(summaries, kept=kept, fraction=fraction) for kept, fraction in _kept(summaries)]
    return f"{text_table(HEADINGS, lines)}\n\n{HOW_TO_READ}"


def _kept(summaries: Sequence[RetentionSummary]) -> list[tuple[int, float]]:
    """(experts kept, fraction of the large models' experts) of each line, most experts first."""
    lines = {s.keep_fraction: s.num_experts_kept for s in summaries if s.model != SMALL}
    small = find_summary(summaries, model=SMALL, method=FULL)
    if small and small.num_experts_kept not in lines.values():
        full = lines.get(1.0, small.num_experts_kept)
        lines[small.num_experts_kept / full] = small.num_experts_kept
    return [(kept, fraction) for fraction, kept in sorted(lines.items(), reverse=True)]


def _cells(summaries: Sequence[RetentionSummary], *, kept: int, fraction: float) -> tuple[str, ...]:
    def of(model: str, method: str) -> RetentionSummary | None:
        # the full model is what any choice keeps when it keeps everything
        method = FULL if fraction == 1.0 and method == CHOSEN else method
        return find_summary(summaries, model=model, method=method, keep_fraction=fraction)

    emo, small = of(EMO, CHOSEN), find_summary(summaries, model=SMALL, method=FULL)
    selectivity = None if emo is None else emo.selectivity
    return (
        f"{kept} ({share(fraction)})",
        _loss_and_rise(emo),
        _loss_and_rise(of(STANDARD, CHOSEN)),
        f"{small.loss:.3f}" if small and small.num_experts_kept == kept else MISSING,
        _loss_and_rise(of(EMO, RANDOM)),
        MISSING if selectivity is None else signed(selectivity),
    )


def _loss_and_rise(summary: RetentionSummary | None) -> str:
    if summary is None:
        return MISSING
    return f"{summary.loss:.3f}" + (f" ({signed(summary.rise)})" if summary.method != FULL else "")
