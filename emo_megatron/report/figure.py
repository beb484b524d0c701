"""The figure of `retention`: one column per model, with loss above and selectivity below, against experts kept."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_megatron.experts.select import MaxLossIncrease
from emo_megatron.files import whole
from emo_megatron.report.rows import CHOSEN, EMO, FULL, RANDOM, STANDARD, RetentionRow, RetentionSummary, summarise
from emo_megatron.report.table import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#222222", "#8a8a8a"
# matplotlib types the keys as its own literals
STYLE: dict[Any, Any] = {
    "font.size": 13.0,
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
NAMES = {EMO: "EMO", STANDARD: "standard MoE"}
# the palette of Okabe and Ito; markers differ too, for print in grey
LINES: dict[str, dict[str, Any]] = {
    CHOSEN: {"color": "#0072B2", "marker": "o", "linewidth": 2.8},
    "frequency": {"color": "#56B4E9", "marker": "s"},
    "layerwise": {"color": "#009E73", "marker": "^"},
    "easy_ep": {"color": "#D55E00", "marker": "D"},
    "reap": {"color": "#CC79A7", "marker": "v"},
    RANDOM: {"color": FAINT, "linestyle": (0, (4, 2.5)), "marker": ""},
}
INCHES_A_MODEL, INCHES_HIGH, DOTS_PER_INCH = 5.6, 7.2, 120
CHARACTERS_AN_INCH = 12
"""Characters of the caption per inch of width."""


@contextlib.contextmanager
def drawing(path: Path, **options: Any) -> Iterator[Figure]:
    """Yield an empty figure in the project's style, and write it as PNG after the block; a failure leaves no file.

    Args:
        path: path of the PNG; missing folders are created.
        **options: options of matplotlib's Figure.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the retention figure needs matplotlib: pip install 'emo_megatron[report]'") from error
    with rc_context(STYLE), whole(path) as unfinished:
        figure = Figure(facecolor="white", **options)
        yield figure
        figure.savefig(unfinished, format="png")


def over_shares(axes: Axes, shares: Iterable[float]) -> None:
    """Make the x axis show shares of experts kept, one tick per share, with the largest share on the left."""
    ticks = sorted(set(shares)) or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[-1] * 1.12, ticks[0] / 1.12)
    axes.set_xticks(ticks, [share(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_methods(rows: Sequence[RetentionRow], path: Path | str, *, caption: str = "", bound: MaxLossIncrease) -> Path:
    """Draw the figure and write it as PNG; a failure leaves no file.

    Args:
        rows: rows of one or several models; the figure shows means over domains, each domain with its own experts.
        path: path of the PNG; missing folders are created.
        caption: text below the figure: data, sizes, versions.
        bound: drawn as a dotted level line at the highest loss within the bound.
    """
    path, summaries = Path(path), summarise(rows)
    models = sorted({row.model for row in rows})
    size = (max(2, len(models)) * INCHES_A_MODEL, INCHES_HIGH)
    with drawing(path, figsize=size, dpi=DOTS_PER_INCH, layout="constrained") as figure:
        axes = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row", height_ratios=(1.5, 1.0))
        for (losses, selectivity), model in zip(axes.T, models, strict=True):
            own = [summary for summary in summaries if summary.model == model]
            _draw_losses(losses, own, bound=bound)
            _draw_selectivity(selectivity, own)
            losses.set_title(NAMES.get(model, model))
        axes[0, 0].set_ylabel("loss (nats per token)")
        axes[1, 0].set_ylabel("selectivity (nats)")
        axes[0, 0].legend(frameon=False, fontsize=11)
        below = textwrap.fill(caption, width=round(size[0] * CHARACTERS_AN_INCH))
        figure.supxlabel(below, size=10, color="#5a5a5a")
    return path


def _draw_losses(axes: Axes, summaries: list[RetentionSummary], *, bound: MaxLossIncrease) -> None:
    full = next((s for s in summaries if s.method == FULL), None)
    for method, line in LINES.items():
        points = [s for s in summaries if s.method == method]
        if points:
            points = sorted([*points, *([full] if full else [])], key=lambda s: s.keep_fraction)
            axes.plot([s.keep_fraction for s in points], [s.loss for s in points], label=method, **line)
    if full:
        axes.axhline(bound.highest(full.loss), color=INK, linewidth=0.9, linestyle=":", label="--max-loss-increase")
    over_shares(axes, [s.keep_fraction for s in summaries])


def _draw_selectivity(axes: Axes, summaries: list[RetentionSummary]) -> None:
    for method, line in LINES.items():
        own = [s for s in summaries if s.method == method]
        points = [(s.keep_fraction, s.selectivity) for s in own if s.selectivity is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **line)
    axes.axhline(0.0, color=FAINT, linewidth=0.9)
    axes.set_xlabel("share of routed experts kept")
    over_shares(axes, [s.keep_fraction for s in summaries])
