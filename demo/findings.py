"""The demo's results: a table of the models, a check of each claim about the method, and the figure.

The input is a list of rows; each row is one evaluation. A result whose rows are missing is left out.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from demo import recipe
from demo.figure import plot_retention
from demo.losses import KIND, Measured, minus, read_measured
from demo.measure import MEASURED
from emo_megatron.commands.retention import versions
from emo_megatron.json_files import read_json, read_object
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
    rows_of,
    save_rows,
    summarise,
)
from emo_megatron.report.table import KEPT, MISSING, share, signed, text_table

EIGHTH = 1 / 8
HOW_TO_READ = """\
Loss in nats per token on validation documents; lower is better. Each domain keeps the experts that
it uses most; the table shows the mean over the domains. In brackets: the loss increase from dropping
the other experts. Selectivity: loss increase on other domains minus loss increase on the own domain."""
ABOUT_ERRORS = """\
Statements about this run. ± is the standard error over documents; runs with another seed differ by more, see
docs/experiments.md."""
HEADINGS = (
    KEPT,
    ("", "EMO"),
    ("standard", "MoE"),
    ("small MoE", "from scratch"),
    ("EMO, random", "experts"),
    ("", "selectivity"),
)


class Finding(NamedTuple):
    """A statement about the measured numbers, in nats per token."""

    name: str
    value: float
    text: str
    """The statement with its numbers, for people; the words are the same whether it holds or not."""
    bound: float | None = None
    """The statement holds if `value` is at most this number; None: the statement only reports a number."""

    @property
    def holds(self) -> bool | None:
        """Whether the statement holds; None for one that only reports."""
        return None if self.bound is None else self.value <= self.bound

    @property
    def mark(self) -> str:
        """What the demo prints before the text."""
        return {None: "     ", True: "yes  ", False: "NO   "}[self.holds]


def findings(losses: Mapping[str, Measured]) -> list[Finding]:
    """The statements about the models. A statement whose numbers were not measured is left out.

    Args:
        losses: name of a model -> its losses.
    """
    found = []
    emo, standard, small = (losses.get(name) for name in (EMO, STANDARD, SMALL))
    if emo and standard:
        gap = minus(emo, standard)
        text = (
            f"With all experts, EMO's loss minus the standard MoE's: {gap} "
            f"({emo.loss():.3f} and {standard.loss():.3f})."
        )
        found.append(Finding("full_models", gap.nats, text))
        for name, fraction, part in (("quarter_increase", QUARTER, 3), ("eighth_increase", EIGHTH, 2)):
            if (CHOSEN, fraction) in emo.nats.keys() & standard.nats.keys():
                first, second = emo.increase(CHOSEN, fraction), standard.increase(CHOSEN, fraction)
                text = (
                    f"With {share(fraction)} of the experts, EMO's loss increase is {first} and the standard MoE's "
                    f"{second}. EMO's is at most 1/{part} of the standard MoE's."
                )
                # if the standard MoE loses nothing, EMO must lose nothing either
                found.append(Finding(name, first.nats, text, max(second.nats, 0.0) / part))
    if emo and (CHOSEN, QUARTER) in emo.nats:
        found += _of_quarter(emo, small)
    return found


def _of_quarter(emo: Measured, small: Measured | None) -> list[Finding]:
    """Statements about EMO's modules with a quarter of the experts."""
    found = []
    chosen = emo.increase(CHOSEN, QUARTER)
    if (RANDOM, QUARTER) in emo.nats:
        by_chance = emo.increase(RANDOM, QUARTER)
        text = (
            f"EMO's loss increase is {by_chance} with a random quarter of the experts and {chosen} with the chosen "
            "quarter. The first is at least twice the second."
        )
        found.append(Finding("choice_matters", 2 * max(chosen.nats, 0.0), text, by_chance.nats))
    if emo.increase_on_others is not None:
        text = (
            f"The loss increase of EMO's quarters is {signed(emo.increase_on_others)} on other domains and "
            f"{signed(chosen.nats)} on their own. The first is at least twice the second."
        )
        found.append(Finding("quarter_is_selective", 2 * max(chosen.nats, 0.0), text, emo.increase_on_others))
    if small:
        apart = minus(emo, small, method=CHOSEN, keep_fraction=QUARTER)
        text = (
            f"The loss of EMO's quarter minus that of a model of this size trained from scratch: {apart} "
            f"({emo.loss(CHOSEN, QUARTER):.3f} and {small.loss():.3f})."
        )
        found.append(Finding("quarter_and_small", apart.nats, text))
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
    run = read_object(output / "demo.json", kind="the settings of a run")
    stored = run["size"]
    size = recipe.Size(**stored)
    seeds = {m.name: m.seed for of in (recipe.main_models, recipe.extra_models) for m in of(size, seed=run["seed"])}
    paths = {model: output / model / "losses" / MEASURED for model in models}
    rows = [
        row
        for model, path in paths.items()
        for row in rows_of(read_json(path, kind=KIND), model=model, seed=seeds[model], versions=versions())
    ]
    save_rows(rows, output / "retention")
    caption = (
        f"{size.experts} routed experts + 1 shared, top-{size.top_k}, {size.layers} layers, "
        f"{size.tokens / 1e6:.1f}M tokens of {len({row.evaluated_on for row in rows})} domains; {rows[0].versions}"
    )
    plot_retention(rows, output / "retention.png", caption=caption)
    print(table(rows))
    if stored == json.loads(json.dumps(asdict(recipe.FULL))):
        print(f"\n{ABOUT_ERRORS}")
        for finding in findings({model: read_measured(path) for model, path in paths.items()}):
            print(f"  {finding.mark}{finding.text}")
    print(f"\nrows: {output}/retention.csv and .json; figure: {output}/retention.png", flush=True)


if __name__ == "__main__":
    recipe.run_step(main)
