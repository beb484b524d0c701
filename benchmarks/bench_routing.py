"""How long does routing with pools take, compared with other routers?

Four routers run in turns in one process: the compiled ops, the reference ops, the standard router's maths from
Megatron's own functions (no pools), and the paper's equations as a loop over documents. On a GPU, Transformer Engine's
fused router also runs if installed. All routers compute the balance and z losses. Timing starts only after each router
gives the routing and gradients of the reference on the same input; otherwise no results are written. On a GPU, steps
are replays of CUDA graphs; steps are also timed without graphs, which shows the time of the host.

    python benchmarks/bench_routing.py --quick       # the sizes with a CPU target, in about half a minute
    python benchmarks/bench_routing.py               # all 56 sizes, about twenty minutes on two cores
    python benchmarks/bench_routing.py --tokens 4096 --experts 160 --top-k 6
    python benchmarks/bench_routing.py --tokens 8192 --experts 128 256 --top-k 8 --groups 8 --group-topk 4
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from clocks import Replay, Step, replay_of
from routers import Case, Groups, Router, Shape, check, make_case, pool_router, route_by_loop, step_of, stock_router
from targets import FUSED, GROUPED, LOOP, MODES, NATIVE, REFERENCE, STOCK, TARGET_THREADS, Result, verdicts
from timing import (
    RESULTS,
    Device,
    Ended,
    Rounds,
    copy_bandwidth,
    describe_machine,
    estimate,
    interleave,
    markdown_table,
    pick_device,
    result_name,
    run_script,
    write_results,
)
from tqdm import tqdm

from emo_megatron import ops

MOST_CAPTURED = 256
"""Documents: a graph of the loop over more has too many nodes to make."""
LARGE = 8192
"""Above so many tokens only the largest top-k is run, unless sizes are given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the routing ops against the reference, Megatron's router and a loop over documents, side by side."""

    quick: bool = False
    """Only T=8192 E=128 K=8, the sizes that have a target on a CPU, with fewer rounds."""
    device: Device = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    threads: int = TARGET_THREADS
    """CPU threads."""
    tokens: tuple[int, ...] = ()
    """Tokens per batch. Default: 1024 8192 65536."""
    experts: tuple[int, ...] = ()
    """Routed experts. Default: 64 128 256 512."""
    top_k: tuple[int, ...] = ()
    """Experts per token. Default: 2 7 8; with 65536 tokens 8 only."""
    document_tokens: tuple[int, ...] = ()
    """Mean number of tokens per document. Default: 512 32, which makes 16 and 256 documents of 8192 tokens."""
    groups: int = 0
    """Number of groups of experts: also time the compiled ops with routing limited to some groups; 0: do not."""
    group_topk: int = 4
    """Groups of experts per token, with --groups."""
    seconds: float | None = None
    """Seconds to spend on each size, at least three rounds. Default: 2, quick 1."""
    output: Path = field(default=RESULTS)
    """Folder of the results: a CSV and a page, both named after the hardware."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tokens", "experts", "top_k")}
        sizes |= {"document_tokens": self.document_tokens, "threads": (self.threads,)}
        for name, values in sizes.items():
            if any(value < 1 for value in values):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {values}")

    @property
    def limit(self) -> Groups | None:
        """The groups to time the compiled ops with, None for none."""
        return (self.groups, self.group_topk) if self.groups else None

    @property
    def is_all(self) -> bool:
        """Whether all sizes are run, but for the large ones with a smaller top-k."""
        return not (self.quick or self.tokens or self.top_k)

    def shapes(self) -> Iterator[Shape]:
        """Every size to run."""
        tokens = self.tokens or ((8192,) if self.quick else (1024, 8192, 65536))
        experts = self.experts or ((128,) if self.quick else (64, 128, 256, 512))
        top_ks = self.top_k or ((8,) if self.quick else (2, 7, 8))
        for T, E, K, length in product(tokens, experts, top_ks, self.document_tokens or (512, 32)):
            if K < E and not (self.is_all and T > LARGE and max(top_ks) > K):
                yield Shape(num_tokens=T, num_experts=E, top_k=K, num_documents=max(T // length, 1))


def main(options: Options) -> list[Path]:
    """Check, time, write; returns the files.

    Raises:
        ValueError: the compiled ops are missing, or a router does not route as the reference does.
    """
    device = pick_device(options.device)
    reason = ops.why_not_native(device.type)
    if reason:
        raise ValueError(f"there are no compiled ops to time: {reason}")
    torch.set_num_threads(options.threads)
    metadata = describe_machine(device, threads=options.threads)
    routers, not_run = _routers(device, options.limit)
    bandwidth = copy_bandwidth(device)
    metadata["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s, read and written"

    shapes = list(options.shapes())
    if not shapes:
        raise ValueError("no size to run: --top-k must be below --experts")
    seconds = options.seconds or (1.0 if options.quick else 2.0)
    results = []
    progress = tqdm(shapes, desc="sizes", disable=None)
    try:
        for shape in progress:
            progress.set_postfix_str(str(shape))
            case = make_case(shape, device=device)
            results.append(_measure(case, routers, seconds=seconds, limit=options.limit))
            del case
    except Ended:
        if not results:
            raise
        metadata["ended"] = f"after {len(results)} of {len(shapes)} sizes"

    rows = [row for result in results for row in _rows(result, not_run, bandwidth)]
    page = _page(results, not_run, metadata, bandwidth=bandwidth, device=device, options=options)
    print(page)
    name = result_name("routing", device=device, is_quick=options.quick)
    return write_results(options.output, name, rows=rows, page=page)


def _routers(device: torch.device, limit: Groups | None) -> tuple[dict[str, Router], dict[str, str]]:
    """The routers to time, and why others are not."""
    routers = {NATIVE: pool_router("native"), REFERENCE: pool_router("reference")}
    if limit is not None:
        routers[GROUPED] = pool_router("native", groups=limit)
    not_run = {}
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        routers[STOCK] = stock_router(fused=False)
        if device.type != "cuda":
            not_run[FUSED] = "needs a CUDA device"
        elif not HAVE_TE:
            not_run[FUSED] = "Transformer Engine is not installed"
        else:
            routers[FUSED] = stock_router(fused=True)
    except ImportError as error:
        not_run |= dict.fromkeys((STOCK, FUSED), f"megatron-core does not import: {error}")
    routers[LOOP] = route_by_loop
    return routers, not_run


def _measure(case: Case, routers: dict[str, Router], *, seconds: float, limit: Groups | None = None) -> Result:
    for name, router in routers.items():
        groups = limit if name == GROUPED else None
        check(name, router, case, has_pools=name not in (STOCK, FUSED), groups=groups)
    steps = {name: step_of(router, case) for name, router in routers.items()}
    rounds = Rounds(fewest=3, most=60, seconds=seconds)
    device = case.logits_TE.device
    samples = interleave(steps, device=device, rounds=rounds)
    if device.type != "cuda":
        return Result(shape=case.shape, samples=samples)
    if case.shape.num_documents > MOST_CAPTURED:
        del steps[LOOP]
    replays = interleave(_replays(steps), device=device, rounds=rounds)
    return Result(shape=case.shape, samples=replays, eager=samples)


def _replays(steps: dict[str, Step]) -> dict[str, Replay]:
    """Of those that can be captured; the compiled ops must be."""
    found = {}
    for name, step in steps.items():
        try:
            found[name] = replay_of(step)
        except RuntimeError as error:
            if name == NATIVE:
                raise
            print(f"{name} cannot be captured: {error}", file=sys.stderr)
    return found


def _rows(result: Result, not_run: dict[str, str], bandwidth: float) -> Iterator[dict[str, Any]]:
    """The CSV: one row a size, router and mode, times in microseconds."""
    for router, mode in product([*(result.eager or result.samples), *not_run], MODES):
        row: dict[str, Any] = {
            "tokens": result.shape.num_tokens,
            "experts": result.shape.num_experts,
            "top_k": result.shape.top_k,
            "documents": result.shape.num_documents,
            "router": router,
            "mode": mode,
            "status": not_run.get(router, "measured" if router in result.samples else "not captured as a graph"),
        }
        numbers: dict[str, float | int] = {}
        if router in result.samples:
            values = result.values(router, mode)
            time, times_native = estimate(values).scaled(1e6), result.times_native(router, mode)
            floor = result.floor(mode, bandwidth) * 1e6
            numbers = {
                "median_us": time.median,
                "low_us": time.low,
                "high_us": time.high,
                "fastest_us": min(values) * 1e6,
                "times_native": times_native.median,
                "times_native_low": times_native.low,
                "times_native_high": times_native.high,
                "native_floor_us": floor,
                "rounds": len(values),
            }
        if router in result.eager:
            eager = result.values(router, mode, is_eager=True)
            numbers["eager_us"] = estimate(eager).median * 1e6
        numbers = {key: round(value, 3) for key, value in numbers.items()}
        columns = (
            *("median_us", "low_us", "high_us", "fastest_us"),
            *("times_native", "times_native_low", "times_native_high", "native_floor_us", "rounds"),
            "eager_us",
        )
        yield row | {column: numbers.get(column, "") for column in columns}


def _page(
    results: list[Result],
    not_run: dict[str, str],
    metadata: dict[str, str],
    *,
    bandwidth: float,
    device: torch.device,
    options: Options,
) -> str:
    parts = ["# Routing ops\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n")
    parts += [f"Not run: {name} ({reason}).\n" for name, reason in not_run.items()]
    parts.append(
        "Every router computes the balance and z losses. Milliseconds of the compiled ops (document_scores, "
        "select_pool, pool_topk, losses), then how many times as long the others take: medians with 95 % intervals. "
        "Floor: bytes the compiled ops cannot but move, at the copy bandwidth; what fits a cache can be faster.\n"
    )
    if device.type == "cuda":
        parts.append(
            "Steps are replays of CUDA graphs. Eager: the compiled ops without graphs, which is the time of the host "
            "where it is slower than the GPU.\n"
        )
    if options.is_all:
        top_k = max(result.shape.top_k for result in results)
        parts.append(f"Above {LARGE} tokens only K={top_k} is run, unless sizes are given.\n")
    lines = verdicts(results, device=device, threads=options.threads)
    parts.append("## Targets, forward + backward\n")
    parts.append("\n".join(f"- {line}" for line in lines) + "\n")
    for mode in MODES:
        parts.append(f"## {mode.capitalize()}\n")
        parts.append(_table(results, mode, bandwidth=bandwidth))
    return "\n".join(parts)


def _table(results: list[Result], mode: str, *, bandwidth: float) -> str:
    """One row a size."""
    others = [name for name in results[0].eager or results[0].samples if name != NATIVE]
    eager = ["eager, ms"] if results[0].eager else []
    head = ["T", "E", "K", "documents", "native ops, ms", *(f"{o}, x" for o in others)]
    table = []
    for result in results:
        shape = result.shape
        sizes = (shape.num_tokens, shape.num_experts, shape.top_k, shape.num_documents)
        row = [*map(str, sizes), f"{estimate(result.values(NATIVE, mode)).median * 1e3:.3f}"]
        row += [str(result.times_native(other, mode)) if other in result.samples else "-" for other in others]
        row.append(f"{result.floor(mode, bandwidth) * 1e3:.3f}")
        if eager:
            values = result.values(NATIVE, mode, is_eager=True)
            row.append(f"{estimate(values).median * 1e3:.3f}")
        table.append(row)
    return markdown_table([*head, "floor, ms", *eager], table)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
