"""The demo's results: a table of the models, a check of each claim about the method, and the figure.

The input is a list of rows; each row is one evaluation. A result whose rows are missing is left out.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from demo import recipe
from demo.figure import plot_retention
from emo_megatron.json_files import read_object
from emo_megatron.report.rows import (
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
    save_rows,
    summarise,
)
from emo_megatron.report.table import KEPT, MISSING, share, signed, text_table

EIGHTH = 1 / 8
HOW_TO_READ = """\
Loss in nats per token on validation documents; lower is better. Each domain keeps the experts that
it uses most; the table shows the mean over the domains. In brackets: the loss increase from dropping
the other experts. Selectivity: loss increase on other domains minus loss increase on the own domain."""
HEADINGS = (
    KEPT,
    ("", "EMO"),
    ("standard", "MoE"),
    ("small MoE", "from scratch"),
    ("EMO, random", "experts"),
    ("", "selectivity"),
)


class Finding(NamedTuple):
    """A claim about the measured numbers, in nats per token, and whether the claim holds."""

    name: str
    value: float
    bound: float
    holds: bool
    text: str
    """The claim with its numbers, for people; the words are the same whether the claim holds or not."""


def findings(rows: Iterable[RetentionRow]) -> list[Finding]:
    """Check the claims about the method. A claim whose numbers were not measured is left out."""
    summaries = summarise(rows)

    def find(model: str, method: str, keep_fraction: float = 1.0) -> RetentionSummary | None:
        return find_summary(summaries, model=model, method=method, keep_fraction=keep_fraction)

    found = []
    for name, fraction, part in (("quarter_rise", QUARTER, 5), ("eighth_rise", EIGHTH, 4)):
        emo, standard = find(EMO, CHOSEN, fraction), find(STANDARD, CHOSEN, fraction)
        if emo and standard:
            # if the standard MoE loses nothing, EMO must lose nothing either
            bound = max(standard.loss_increase, 0.0) / part
            text = (
                f"With {share(fraction)} of the experts, EMO's loss increase is at most 1/{part} of the standard "
                f"MoE's: {signed(emo.loss_increase)} against {signed(standard.loss_increase)} nats per token."
            )
            found.append(Finding(name, emo.loss_increase, bound, emo.loss_increase <= bound, text))
    emo, small, by_chance = find(EMO, CHOSEN, QUARTER), find(SMALL, FULL), find(EMO, RANDOM, QUARTER)
    if emo and small:
        text = (
            "A quarter of EMO's experts has a lower loss than a model of that size trained from scratch: "
            f"{emo.loss:.3f} against {small.loss:.3f}."
        )
        found.append(Finding("quarter_beats_small", emo.loss, small.loss, emo.loss < small.loss, text))
    if emo and by_chance:
        bound = 3 * max(emo.loss_increase, 0.0)
        text = (
            "The loss increase of a random quarter of EMO's experts is at least 3 times that of a chosen quarter: "
            f"{signed(by_chance.loss_increase)} against {signed(emo.loss_increase)} nats per token."
        )
        found.append(Finding("choice_matters", by_chance.loss_increase, bound, by_chance.loss_increase >= bound, text))
    if emo and emo.selectivity is not None:
        bound, value = 0.3, emo.selectivity
        text = f"The selectivity of a quarter of EMO's experts is over {bound:g} nats per token: {signed(value)}."
        found.append(Finding("quarter_is_selective", value, bound, value > bound, text))
    full, standard = find(EMO, FULL), find(STANDARD, FULL)
    if full and standard:
        bound, value = 0.06, full.loss - standard.loss
        text = (
            f"With all experts, EMO's loss is at most {bound:g} nats per token above the standard MoE's: "
            f"{signed(value)} ({full.loss:.3f} against {standard.loss:.3f})."
        )
        found.append(Finding("full_models_match", value, bound, value <= bound, text))
    return found


def table(rows: Iterable[RetentionRow]) -> str:
    """The means as a text table, one line per number of experts kept, followed by how to read the table."""
    summaries = summarise(rows)
    lines = [_cells(summaries, kept=kept, fraction=fraction) for kept, fraction in _kept(summaries)]
    return f"{text_table(HEADINGS, lines)}\n\n{HOW_TO_READ}"


def _kept(summaries: Sequence[RetentionSummary]) -> list[tuple[int, float]]:
    """Per line of the table: experts kept, and their fraction of the large models' experts; most experts first."""
    lines = {s.keep_fraction: s.num_experts_kept for s in summaries if s.model != SMALL}
    small = find_summary(summaries, model=SMALL, method=FULL)
    if small and small.num_experts_kept not in lines.values():
        full = lines.get(1.0, small.num_experts_kept)
        lines[small.num_experts_kept / full] = small.num_experts_kept
    return [(kept, fraction) for fraction, kept in sorted(lines.items(), reverse=True)]


def _cells(summaries: Sequence[RetentionSummary], *, kept: int, fraction: float) -> tuple[str, ...]:
    def of(model: str, method: str) -> RetentionSummary | None:
        # with all experts kept, every choice is the full model
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
    return f"{summary.loss:.3f}" + (f" ({signed(summary.loss_increase)})" if summary.method != FULL else "")


def main() -> None:
    """Print the table and write the rows and the figure; arguments: the run's folder, then names of models."""
    output, models = Path(sys.argv[1]), sys.argv[2:]
    stored = read_object(output / "demo.json", kind="the settings of a run")["size"]
    size = recipe.Size(**stored)
    rows = [row for model in models for row in load_rows(output / model / "retention" / "retention.json")]
    save_rows(rows, output / "retention")
    caption = (
        f"{size.experts} routed experts + 1 shared, top-{size.top_k}, {size.layers} layers, "
        f"{size.tokens / 1e6:.1f}M tokens of {len({row.evaluated_on for row in rows})} domains; {rows[0].versions}"
    )
    plot_retention(rows, output / "retention.png", caption=caption)
    print(table(rows))
    is_full = stored == json.loads(json.dumps(asdict(recipe.FULL)))
    for finding in findings(rows) if is_full else []:
        print(f"  {'yes' if finding.holds else 'NO '}  {finding.text}")
    print(f"\nrows: {output}/retention.csv and .json; figure: {output}/retention.png", flush=True)


if __name__ == "__main__":
    recipe.run_step(main)
