"""The demo's retention figure: loss against experts kept, and the loss increase of modules on other domains."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from emo_megatron.report.figure import FAINT, INK, drawing, over_shares
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
    summarise,
)
from emo_megatron.report.table import share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# the palette of Okabe and Ito: its colours differ for every common colour blindness and in grey
COLORS = {EMO: "#0072B2", STANDARD: "#D55E00", SMALL: "#1b7f5f"}
NAMES = {
    (EMO, CHOSEN): "EMO",
    (EMO, RANDOM): "EMO, random\nexperts",
    (STANDARD, CHOSEN): "standard MoE",
    (STANDARD, RANDOM): "standard MoE,\nrandom",
}
LINES: dict[str, dict[str, Any]] = {
    CHOSEN: {"linewidth": 3.2, "marker": "o", "markersize": 7.5},
    RANDOM: {"linewidth": 1.9, "linestyle": (0, (4, 2.5))},
}
INCHES, DOTS_PER_INCH = (12.8, 5.2), 125
MAX_ANNOTATED = 10


def plot_retention(rows: Sequence[RetentionRow], path: Path | str, *, caption: str = "") -> Path:
    """Draw the figure and write it as a PNG of 1600 x 650 pixels; a failure leaves no file.

    Left: loss against the share of experts kept. Thin lines show domains, bold lines show the mean over domains.
    Right: EMO's loss increase on each domain with the quarter of the experts chosen for each domain.

    Args:
        rows: models, methods, fractions and pairs of domains may be missing.
        path: path of the PNG; missing folders are created.
        caption: text below the figure: model, data, commit.
    """
    path = Path(path)
    with drawing(path, figsize=INCHES, dpi=DOTS_PER_INCH) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.08, 1.0))
        figure.subplots_adjust(left=0.066, right=0.988, top=0.805, bottom=0.235, wspace=0.57)
        figure.text(0.012, 0.925, _headline(summarise(rows)), size=18, weight="bold")
        figure.text(0.012, 0.03, caption, size=10.5, color="#5a5a5a")
        _draw_curves(left, rows)
        _draw_crossings(right, rows)
    return path


def _headline(summaries: list[RetentionSummary]) -> str:
    quarters = [find_summary(summaries, model=model, method=CHOSEN, keep_fraction=QUARTER) for model in (EMO, STANDARD)]
    if quarters[0] is None or quarters[1] is None:
        return "Loss when only some of the experts are kept"
    emo, standard = (_number(quarter.loss_increase) for quarter in quarters if quarter)
    return f"Keep a quarter of the experts: EMO loses {emo} nats per token, a standard MoE {standard}"


def _draw_curves(axes: "Axes", rows: Sequence[RetentionRow]) -> None:
    summaries = summarise(rows)
    ends = []
    for model in (STANDARD, EMO):
        for method in (RANDOM, CHOSEN):
            means = [s for s in summaries if s.model == model and s.method in (FULL, method)]
            if not any(s.method == method for s in means):
                continue
            means.sort(key=lambda s: s.keep_fraction)
            axes.plot(
                [s.keep_fraction for s in means],
                [s.loss for s in means],
                color=COLORS[model],
                zorder=4,
                **LINES[method],
            )
            if method == CHOSEN:
                _draw_domains(axes, [row for row in rows if row.model == model])
            ends.append((means[0].loss, NAMES[model, method], COLORS[model]))
    _draw_small(axes, summaries)
    over_shares(axes, [row.keep_fraction for row in rows if row.model != SMALL])
    axes.set_xlabel("share of routed experts kept (thin lines: each domain)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Loss on the domain the experts were chosen for", pad=10)
    _name_lines(axes, ends)


def _name_lines(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name to the right of its end, and move names apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.13 * (high - low)
    ends = sorted(ends)
    heights = [loss for loss, _, _ in ends]
    for _ in range(4 * len(ends)):
        for below in range(len(ends) - 1):
            push = max(gap - (heights[below + 1] - heights[below]), 0.0) / 2
            heights[below] -= push
            heights[below + 1] += push
    for height, (_, name, color) in zip(heights, ends, strict=True):
        axes.text(
            1.015,
            height,
            name,
            color=color,
            size=12.5,
            weight="bold",
            va="center",
            linespacing=0.95,
            transform=axes.get_yaxis_transform(),
        )


def _draw_domains(axes: "Axes", rows: list[RetentionRow]) -> None:
    """Draw a thin line for each domain of one model."""
    losses: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.is_own and row.method in (FULL, CHOSEN):
            points = losses.setdefault(row.evaluated_on, {})
            points.setdefault(row.keep_fraction, []).append(row.loss)
    for points in losses.values():
        shares = sorted(points)
        means = [fmean(points[share]) for share in shares]
        axes.plot(shares, means, color=COLORS[rows[0].model], alpha=0.22, linewidth=1.1, zorder=2)


def _draw_small(axes: "Axes", summaries: list[RetentionSummary]) -> None:
    """Draw the small model's loss as a short level line, at its share of the large models' experts."""
    small = find_summary(summaries, model=SMALL, method=FULL)
    if small is None:
        return
    full = [s for s in summaries if s.model != SMALL and s.method == FULL]
    share = small.num_experts_kept / full[0].num_experts_kept if full else QUARTER
    ends, color = (share * 1.28, share / 1.28), COLORS[SMALL]
    axes.plot(ends, [small.loss] * 2, color=color, linewidth=4.5, solid_capstyle="butt", zorder=5)
    axes.annotate(
        f"small MoE from scratch\n({small.num_experts_kept} experts)",
        (share, small.loss),
        xytext=(share, 0.09),
        textcoords=("data", "axes fraction"),
        arrowprops={"arrowstyle": "-", "color": color, "shrinkB": 3},
        color=color,
        size=12,
        weight="bold",
        ha="center",
        va="center",
        linespacing=0.95,
        zorder=6,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _draw_crossings(axes: "Axes", rows: Sequence[RetentionRow]) -> None:
    """Draw EMO's loss increase as a heat map: experts chosen for the row's domain, text of the column's domain."""
    cells, fraction = _crossings(rows)
    axes.set_title(f"Loss increase with {share(fraction)} of EMO's experts", pad=10)
    if not cells:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "modules were not evaluated on other domains", ha="center", color=FAINT)
        return
    names = sorted({name for pair in cells for name in pair})
    grid = [[cells.get((kept, text), math.nan) for text in names] for kept in names]
    # with loss increases near 0, the full range of colours would show noise
    darkest = max(0.1, *cells.values())
    image = axes.imshow(grid, cmap="Blues", vmin=0.0, vmax=darkest, aspect="auto")
    short = [name if len(name) <= 11 else name[:10] + "\N{HORIZONTAL ELLIPSIS}" for name in names]
    axes.set_xticks(range(len(names)), short, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), short)
    axes.tick_params(length=0, labelsize=11.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("evaluated on (numbers: nats per token)", labelpad=1)
    axes.text(-0.015, 1.045, "chosen for", ha="right", size=12, transform=axes.transAxes)
    if len(names) > MAX_ANNOTATED:
        # the colours' axis and its numbers take the room of the last columns
        axes.set_position(axes.get_position().shrunk(0.87, 1.0))
        colours = axes.inset_axes((1.02, 0.0, 0.035, 1.0))
        axes.figure.colorbar(image, cax=colours).ax.tick_params(labelsize=11)
        return
    for (kept, text), rise in cells.items():
        axes.text(
            names.index(text),
            names.index(kept),
            _number(rise),
            ha="center",
            va="center",
            size=11.5,
            weight="bold" if kept == text else "normal",
            color="white" if rise > 0.55 * darkest else INK,
        )


def _crossings(rows: Sequence[RetentionRow]) -> tuple[dict[tuple[str, str], float], float]:
    """EMO's mean loss increase per (chosen for, evaluated on), at the measured share nearest to 1/4; and that share."""
    chosen = [row for row in rows if row.model == EMO and row.method == CHOSEN]
    shares = {row.keep_fraction for row in chosen if not row.is_own}
    if not shares:
        return {}, QUARTER
    fraction = min(shares, key=lambda s: abs(math.log(s / QUARTER)))
    rises: dict[tuple[str, str], list[float]] = {}
    for row in chosen:
        if row.keep_fraction == fraction:
            rises.setdefault((row.domain, row.evaluated_on), []).append(row.loss_increase)
    return {pair: fmean(values) for pair, values in rises.items()}, fraction


def _number(value: float) -> str:
    """Two decimals and, for negative numbers, a minus as wide as a digit; zero has no minus."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
