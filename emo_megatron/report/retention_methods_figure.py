"""The figure of methods: a column for each model, loss above and selectivity below, against the experts kept."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_megatron.experts.select import MaxRise
from emo_megatron.files import whole
from emo_megatron.report.cells import share
from emo_megatron.report.retention_figure import FAINT, INK, NAMES, STYLE
from emo_megatron.report.retention_rows import CHOSEN, FULL, RANDOM, RetentionRow, RetentionSummary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette; markers differ too, for print in grey
LINES: dict[str, dict[str, Any]] = {
    "mean_prob": {"color": "#0072B2", "marker": "o", "linewidth": 2.8},
    "frequency": {"color": "#56B4E9", "marker": "s"},
    "layerwise": {"color": "#009E73", "marker": "^"},
    "easy_ep": {"color": "#D55E00", "marker": "D"},
    "reap": {"color": "#CC79A7", "marker": "v"},
    RANDOM: {"color": FAINT, "linestyle": (0, (4, 2.5)), "marker": ""},
}
INCHES_A_MODEL, INCHES_HIGH, DOTS_PER_INCH = 5.6, 7.2, 120
CHARACTERS_AN_INCH = 12
"""Of the caption."""


def plot_methods(rows: Sequence[RetentionRow], path: Path | str, *, caption: str = "", bound: MaxRise) -> Path:
    """Draw the figure and write it as PNG, whole or not at all.

    Args:
        rows: of one or several models; means over domains are drawn, each with its own experts.
        path: of the PNG; missing folders are made.
        caption: printed below: data, sizes, versions.
        bound: drawn as a level line where the cliff is looked for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the retention figure needs matplotlib: pip install 'emo_megatron[report]'") from error
    path = Path(path)
    summaries = summarise(rows)
    models = sorted({row.model for row in rows})
    with rc_context(STYLE), whole(path) as unfinished:
        size = (max(2, len(models)) * INCHES_A_MODEL, INCHES_HIGH)
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
        axes = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row", height_ratios=(1.5, 1.0))
        for place, model in enumerate(models):
            own = [s for s in summaries if s.model == model]
            _draw_losses(axes[0, place], own, bound=bound)
            _draw_selectivity(axes[1, place], own)
            axes[0, place].set_title(NAMES.get((model, CHOSEN), model))
        axes[0, 0].set_ylabel("loss, nats a token")
        axes[1, 0].set_ylabel("selectivity, nats")
        axes[0, 0].legend(frameon=False, fontsize=11)
        below = textwrap.fill(caption, width=round(size[0] * CHARACTERS_AN_INCH))
        figure.supxlabel(below, size=10, color="#5a5a5a")
        figure.savefig(unfinished, format="png")
    return path


def _draw_losses(axes: Axes, summaries: list[RetentionSummary], *, bound: MaxRise) -> None:
    full = next((s for s in summaries if s.method == FULL), None)
    for method, line in LINES.items():
        points = [s for s in summaries if s.method == method]
        if points:
            points = sorted([*points, *([full] if full else [])], key=lambda s: s.keep_fraction)
            axes.plot([s.keep_fraction for s in points], [s.loss for s in points], label=method, **line)
    if full:
        axes.axhline(bound.highest(full.loss), color=INK, linewidth=0.9, linestyle=":")
    _dress(axes, summaries)


def _draw_selectivity(axes: Axes, summaries: list[RetentionSummary]) -> None:
    for method, line in LINES.items():
        points = [
            (s.keep_fraction, s.selectivity) for s in summaries if s.method == method and s.selectivity is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **line)
    axes.axhline(0.0, color=FAINT, linewidth=0.9)
    axes.set_xlabel("share of experts kept")
    _dress(axes, summaries)


def _dress(axes: Axes, summaries: list[RetentionSummary]) -> None:
    shares = sorted({s.keep_fraction for s in summaries})
    axes.set_xscale("log", base=2)
    # most experts on the left, as a curve of what is lost is read
    axes.set_xlim(shares[-1] * 1.12, shares[0] / 1.12)
    axes.set_xticks(shares, [share(s) for s in shares])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
