"""How many rows does the routing of real models send over expert-parallel ranks, and how many rows does placement save?

Runs the demo's models on validation documents, records the experts of every token, and replays this routing for 2, 4
and 8 ranks: with Megatron's alltoall, with each token sent once, and with each token sent once and placed experts.
Placement uses the statistics of one half of the documents; rows are counted on the other half. Rows and bytes are exact
for this routing; nothing is timed. Documents come from all ranks equally, so a share (R - 1) / R of all rows goes to
another rank.

    make demo
    python benchmarks/replay_routing.py     # two minutes; rewrites the table and the figure of docs/dispatch.md
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from record_routing import Run, record
from safetensors.torch import load_file
from timing import RESULTS, markdown_table, run_script, write_results
from torch import Tensor

from emo_megatron.experts.placement import place
from emo_megatron.experts.stats import load_stats
from emo_megatron.files import whole

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- traffic table: begin -->", "<!-- traffic table: end -->"
MICRO_BATCH = 4096
"""Tokens over which load imbalance is taken: the demo's micro-batch."""
BF16, PAIR = 2, 8
"""Bytes of a number in a hidden state, and of an expert's number and probability."""
ALLTOALL, DEDUP, LOAD, TOGETHER = ("alltoall", "dedup", "dedup, placed by load", "dedup, placed together")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Replay the routing of the demo's models over expert-parallel ranks."""

    runs: Path = ROOT / "runs" / "demo"
    """Folder of a finished demo: emo/checkpoint, standard/checkpoint, corpus/validation."""
    ranks: tuple[int, ...] = (2, 4, 8)
    """Numbers of expert-parallel ranks."""
    tokens: int = 16384
    """Tokens per domain: one half to place experts, the other half to count rows."""
    max_imbalance: float = 1.1
    """Largest load of a rank, relative to the mean, on the half of the documents that places experts."""
    output: Path = RESULTS
    """Folder of traffic.csv and traffic.md."""
    page: Path = ROOT / "docs" / "dispatch.md"
    """Page whose table, a selection of the rows, is rewritten; the figure of the same name is in the same folder."""


RUNS = (
    Run(name="EMO, in training", model="emo", pools=True),
    Run(name="EMO, pools off", model="emo", pools=False),
    Run(name="standard", model="standard", pools=False),
)


ON_PAGE = set(itertools.product(("EMO, in training", "standard"), (2, 8), (DEDUP, TOGETHER)))
"""Routing, ranks and dispatch of the rows that the page shows; traffic.md has all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means over layers and, for imbalance, micro-batches."""

    run: str
    ranks: int
    dispatch: str
    rows_per_token: float
    crossing_bytes: float
    """Per token, one way, bf16 at the model's width."""
    pair_imbalance: float
    row_imbalance: float


def main(options: Options) -> list[Path]:
    """Run the models, replay, write.

    Raises:
        ValueError: the demo's files are not there.
    """
    for name in ("emo/checkpoint", "standard/checkpoint", "corpus/validation"):
        if not (options.runs / name).is_dir():
            raise ValueError(f"{options.runs / name} does not exist: run make demo, or name --runs")
    if BEGIN not in options.page.read_text(encoding="utf-8"):
        raise ValueError(f"--page must have a table to rewrite, between {BEGIN} and {END}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for run in RUNS:
            stem = Path(scratch) / run.name.replace(" ", "-")
            # a process each: Megatron keeps its flags for the life of one
            process = torch.multiprocessing.get_context("spawn").Process(
                target=record, args=(run,), kwargs={"runs": options.runs, "tokens": options.tokens, "stem": stem}
            )
            process.start()
            process.join()
            if process.exitcode:
                raise ValueError(f"{run.name} failed; its output is above")
            rows += _replay(run, options, stem)
    table = _table(rows, shown=rows)
    print(table)
    written = write_results(options.output, "traffic", rows=[_plain(row) for row in rows], page=table)
    return [*written, *_publish(rows, options.page)]


def _publish(rows: Sequence[Row], page: Path) -> list[Path]:
    """Write a selection of the rows into the page, and the figure into the same folder."""
    table = _table(rows, shown=[row for row in rows if (row.run, row.ranks, row.dispatch) in ON_PAGE])
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with whole(page) as unfinished:
        unfinished.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
    return [page, _figure(rows, page.with_suffix(".png"))]


def _replay(run: Run, options: Options, stem: Path) -> list[Row]:
    stats = load_stats(stem.with_suffix(".stats"))
    routing = load_file(stem.with_suffix(".routing"))
    width = int(routing.pop("width"))
    rows = []
    for ranks in options.ranks:
        own = [tuple(range(stats.model.num_experts))] * len(stats.model.layers)
        orders = {ALLTOALL: own, DEDUP: own}
        for name, method in ((LOAD, "load"), (TOGETHER, "coactivation")):
            found = place(stats, num_ranks=ranks, method=method, max_imbalance=options.max_imbalance)
            orders[name] = list(found.order)
        for dispatch, order in orders.items():
            of_layers = dict(zip(stats.model.layers, order, strict=True))
            rows.append(_row(run, ranks, dispatch, of_layers, routing, width))
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """What a placement does to tokens whose experts are known."""

    rows_per_token: float
    """Ranks that hold any of a token's experts, mean: rows sent where each token goes to a rank once."""
    pair_imbalance: float
    """(token, expert) pairs of the fullest rank over the mean: its experts' work."""
    row_imbalance: float
    """Rows of the fullest rank over the mean."""


def spread_of(routing_map_TE: Tensor, *, order: Sequence[int], num_ranks: int) -> Spread:
    """Replay a layer's routing.

    Args:
        routing_map_TE: [T, E] bool, T at least 1, by the experts' own labels.
        order: the expert at each place.
        num_ranks: R, a divisor of E.
    """
    placed_TE = routing_map_TE[:, list(order)]
    pairs_TR = placed_TE.view(len(placed_TE), num_ranks, -1).sum(-1)
    pairs_R = pairs_TR.sum(0).double()
    rows_R = (pairs_TR > 0).sum(0).double()
    return Spread(
        rows_per_token=float(rows_R.sum() / len(pairs_TR)),
        pair_imbalance=float(pairs_R.max() / pairs_R.mean()),
        row_imbalance=float(rows_R.max() / rows_R.mean()),
    )


def _row(
    run: Run,
    ranks: int,
    dispatch: str,
    orders: Mapping[int, tuple[int, ...]],
    routing: Mapping[str, Tensor],
    width: int,
) -> Row:
    spreads = [
        spread_of(part, order=order, num_ranks=ranks)
        for layer, order in orders.items()
        for part in routing[str(layer)].split(MICRO_BATCH)
        # what is left over at the end would weigh as much as a whole micro-batch
        if len(part) == MICRO_BATCH
    ]

    def mean(name: str) -> float:
        return sum(getattr(s, name) for s in spreads) / len(spreads)

    top_k = next(iter(routing.values())).sum(1).double().mean().item()
    is_stock = dispatch == ALLTOALL
    rows = top_k if is_stock else mean("rows_per_token")
    # Megatron sends a float32 probability with each row
    a_way = rows * (width * BF16 + 4) if is_stock else rows * width * BF16 + top_k * PAIR
    return Row(
        run=run.name,
        ranks=ranks,
        dispatch=dispatch,
        rows_per_token=rows,
        crossing_bytes=a_way * (ranks - 1) / ranks,
        pair_imbalance=mean("pair_imbalance"),
        row_imbalance=mean("pair_imbalance" if is_stock else "row_imbalance"),
    )


def _plain(row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row).items()
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields}


def _table(rows: Sequence[Row], *, shown: Sequence[Row]) -> str:
    head = ["routing", "EP", "dispatch", "rows per token", "share of alltoall's rows"]
    head += ["bytes per token to other ranks", "imbalance of the experts' work", "imbalance of rows"]
    stock = {(r.run, r.ranks): r.rows_per_token for r in rows if r.dispatch == ALLTOALL}
    return markdown_table(
        head,
        [
            [
                r.run,
                str(r.ranks),
                r.dispatch,
                f"{r.rows_per_token:.3f}",
                f"{r.rows_per_token / stock[r.run, r.ranks]:.0%}",
                f"{r.crossing_bytes:.0f}",
                f"{r.pair_imbalance:.2f}",
                f"{r.row_imbalance:.2f}",
            ]
            for r in shown
        ],
    )


def _figure(rows: Sequence[Row], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({row.ranks for row in rows})
    figure, axes = plt.subplots(1, len(RUNS), figsize=(10, 3.2), sharey=True, layout="constrained")
    styles = {ALLTOALL: "#b0b0b0", DEDUP: "#7fa8d1", LOAD: "#5d86b5", TOGETHER: "#1f4e79"}
    for axis, run in zip(axes, RUNS, strict=True):
        for offset, (dispatch, colour) in enumerate(styles.items()):
            found = [r for r in rows if r.run == run.name and r.dispatch == dispatch]
            places = [ranks.index(r.ranks) + (offset - 1.5) * 0.2 for r in found]
            axis.bar(places, [r.rows_per_token for r in found], 0.19, color=colour, label=dispatch)
        axis.set_xticks(range(len(ranks)), [f"EP{r}" for r in ranks])
        axis.set_title(run.name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rows per token, each way")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
