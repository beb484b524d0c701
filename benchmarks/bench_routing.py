"""How long does routing take, pools included, and against what?

Four routers take turns in one process: the compiled ops, the reference ops, the standard router's maths from Megatron's
own functions (no pools), and the paper's equations as a loop over documents; on a GPU also Transformer Engine's fused
router where it is installed. All compute the balance and z losses. None is timed before it has routed the same input as
the reference does, gradients included; otherwise nothing is written.

    python benchmarks/bench_routing.py --quick       # the sizes with a target, in about half a minute
    python benchmarks/bench_routing.py               # all sizes, some five minutes on two cores
    python benchmarks/bench_routing.py --tokens 4096 --experts 160 --top-k 6
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from routers import (
    Case,
    Router,
    Shape,
    bytes_moved,
    check,
    make_case,
    pool_router,
    route_by_loop,
    step_of,
    stock_router,
)
from timing import (
    RESULTS,
    Device,
    Estimate,
    Rounds,
    Samples,
    copy_bandwidth,
    describe_machine,
    estimate,
    interleave,
    judge,
    markdown_table,
    pick_device,
    ratio,
    result_name,
    run_script,
    write_results,
)
from tqdm import tqdm

from emo_megatron import ops

NATIVE, REFERENCE = "native ops", "reference ops"
STOCK, FUSED, LOOP = "Megatron, no pools", "Transformer Engine, no pools", "loop over documents"
MODES = {"forward": False, "forward + backward": True}
LARGE = 8192
"""Above so many tokens only the largest top-k is run, unless sizes are given."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """How many times as long another router must take, on a CPU with two threads."""

    shape: Shape
    against: str
    at_least: float


TARGETS = [
    Target(
        shape=Shape(num_tokens=8192, num_experts=128, top_k=8, num_documents=documents), **target
    )
    for documents, target in [
        (16, {"against": LOOP, "at_least": 2.5}),
        (256, {"against": LOOP, "at_least": 6.0}),
        (16, {"against": STOCK, "at_least": 3.0}),
        (256, {"against": STOCK, "at_least": 3.0}),
    ]
]
TARGET_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the routing ops against the reference, Megatron's router and a loop over documents, side by side."""

    quick: bool = False
    """Only T=8192 E=128 K=8, the sizes that have a target, with fewer rounds."""
    device: Device = "auto"
    """auto takes a GPU where there is one."""
    threads: int = TARGET_THREADS
    """CPU threads."""
    tokens: tuple[int, ...] = ()
    """Tokens of a batch. Default: 1024 8192 65536."""
    experts: tuple[int, ...] = ()
    """Routed experts. Default: 64 128 256 512."""
    top_k: tuple[int, ...] = ()
    """Experts a token. Default: 2 7 8; with 65536 tokens 8 only."""
    document_tokens: tuple[int, ...] = ()
    """Mean tokens of a document. Default: 512 32, which makes 16 and 256 documents of 8192 tokens."""
    seconds: float | None = None
    """Time to spend on each size, at least three rounds. Default: 2, quick 1."""
    output: Path = field(default=RESULTS)
    """Folder of the results, a CSV and a page named after the hardware."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("tokens", "experts", "top_k")}
        sizes |= {"document_tokens": self.document_tokens, "threads": (self.threads,)}
        for name, values in sizes.items():
            if any(value < 1 for value in values):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {values}")

    def shapes(self) -> Iterator[Shape]:
        """Every size to run."""
        is_all = not (self.quick or self.tokens or self.top_k)
        tokens = self.tokens or ((8192,) if self.quick else (1024, 8192, 65536))
        experts = self.experts or ((128,) if self.quick else (64, 128, 256, 512))
        top_ks = self.top_k or ((8,) if self.quick else (2, 7, 8))
        for T, E, K, length in product(tokens, experts, top_ks, self.document_tokens or (512, 32)):
            if K < E and not (is_all and T > LARGE and max(top_ks) > K):
                yield Shape(num_tokens=T, num_experts=E, top_k=K, num_documents=max(T // length, 1))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One size."""

    shape: Shape
    samples: dict[str, Samples]

    def values(self, router: str, mode: str) -> list[float]:
        """Seconds of every round."""
        samples = self.samples[router]
        return samples.total if MODES[mode] else samples.forward

    def times_native(self, router: str, mode: str) -> Estimate:
        """How many times as long a router takes as the compiled ops."""
        return ratio(self.values(router, mode), self.values(NATIVE, mode))


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
    facts = describe_machine(device, threads=options.threads)
    routers, not_run = _routers(device)
    bandwidth = copy_bandwidth(device)
    facts["copy bandwidth"] = f"{bandwidth / 1e9:.1f} GB/s, read and written"

    shapes = list(options.shapes())
    if not shapes:
        raise ValueError("no size to run: --top-k must be below --experts")
    seconds = options.seconds or (1.0 if options.quick else 2.0)
    results = []
    progress = tqdm(shapes, desc="sizes", disable=None)
    for shape in progress:
        progress.set_postfix_str(str(shape))
        case = make_case(shape, device=device)
        results.append(_measure(case, routers, seconds=seconds))
        del case

    rows = [row for result in results for row in _rows(result, not_run, bandwidth)]
    page = _page(results, not_run, facts, bandwidth=bandwidth, device=device, options=options)
    print(page)
    name = result_name("routing", device=device, is_quick=options.quick)
    return write_results(options.output, name, rows=rows, page=page)


def _routers(device: torch.device) -> tuple[dict[str, Router], dict[str, str]]:
    """The routers to time, and why others are not."""
    routers = {NATIVE: pool_router("native"), REFERENCE: pool_router("reference")}
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


def _measure(case: Case, routers: dict[str, Router], *, seconds: float) -> Result:
    for name, router in routers.items():
        check(name, router, case, has_pools=name not in (STOCK, FUSED))
    steps = {name: step_of(router, case) for name, router in routers.items()}
    rounds = Rounds(fewest=3, most=60, seconds=seconds)
    samples = interleave(steps, device=case.logits_TE.device, rounds=rounds)
    return Result(shape=case.shape, samples=samples)


def _rows(result: Result, not_run: dict[str, str], bandwidth: float) -> Iterator[dict[str, Any]]:
    """The CSV: one row a size, router and mode, times in microseconds."""
    for router, mode in product([*result.samples, *not_run], MODES):
        row: dict[str, Any] = {
            "tokens": result.shape.num_tokens,
            "experts": result.shape.num_experts,
            "top_k": result.shape.top_k,
            "documents": result.shape.num_documents,
            "router": router,
            "mode": mode,
            "status": not_run.get(router, "measured"),
        }
        numbers: dict[str, float | int] = {}
        if router in result.samples:
            values = result.values(router, mode)
            time, times_native = estimate(values).scaled(1e6), result.times_native(router, mode)
            floor = bytes_moved(result.shape, with_backward=MODES[mode]) / bandwidth * 1e6
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
            numbers = {key: round(value, 3) for key, value in numbers.items()}
        columns = (
            *("median_us", "low_us", "high_us", "fastest_us"),
            *("times_native", "times_native_low", "times_native_high", "native_floor_us", "rounds"),
        )
        yield row | {column: numbers.get(column, "") for column in columns}


def _page(
    results: list[Result],
    not_run: dict[str, str],
    facts: dict[str, str],
    *,
    bandwidth: float,
    device: torch.device,
    options: Options,
) -> str:
    parts = ["# Routing ops\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n")
    parts += [f"Not run: {name} ({reason}).\n" for name, reason in not_run.items()]
    parts.append(
        "Every router computes the balance and z losses. Milliseconds of the compiled ops (document_scores, "
        "select_pool, pool_topk, losses), then how many times as long the others take: medians with 95 % intervals. "
        "Floor: bytes the compiled ops cannot but move, at the copy bandwidth; what fits a cache can be faster.\n"
    )
    parts.append("## Targets\n")
    parts.append("\n".join(f"- {line}" for line in _verdicts(results, device, options)) + "\n")
    for mode in MODES:
        others = [name for name in results[0].samples if name != NATIVE]
        head = ["T", "E", "K", "documents", "native ops, ms", *(f"{o}, x" for o in others)]
        table = []
        for result in results:
            shape = result.shape
            sizes = (shape.num_tokens, shape.num_experts, shape.top_k, shape.num_documents)
            native = estimate(result.values(NATIVE, mode)).scaled(1e3)
            floor = bytes_moved(shape, with_backward=MODES[mode]) / bandwidth * 1e3
            ratios = (str(result.times_native(other, mode)) for other in others)
            table.append([*map(str, sizes), f"{native.median:.3f}", *ratios, f"{floor:.3f}"])
        parts.append(f"## {mode.capitalize()}\n")
        parts.append(markdown_table([*head, "floor, ms"], table))
    return "\n".join(parts)


def _verdicts(results: list[Result], device: torch.device, options: Options) -> Iterator[str]:
    """One line a target: met, missed, undecided, or why it was not judged."""
    found = {result.shape: result for result in results}
    for target in TARGETS:
        claim = f"{target.shape}, forward + backward: at least {target.at_least} x {target.against}"
        result = found.get(target.shape)
        if device.type != "cpu" or options.threads != TARGET_THREADS:
            yield f"not judged: {claim} (a target of the CPU with {TARGET_THREADS} threads)"
        elif result is None or target.against not in result.samples:
            yield f"not judged: {claim} (not run)"
        else:
            mode = "forward + backward"
            reached = result.times_native(target.against, mode)
            verdict = judge(reached, at_least=target.at_least)
            fastest = min(result.values(target.against, mode)) / min(result.values(NATIVE, mode))
            yield f"{verdict}: {claim}; {reached}, fastest rounds {fastest:.2f}"


if __name__ == "__main__":
    run_script(
        lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)))
    )
