"""How long does every compiled op take on the GPU alone, compared with the time to copy its bytes?

Each op runs on several inputs one after the other in one CUDA graph, and the graph is replayed with a cold cache. On a
CPU the ops run without a graph, and every row is marked. The floor is the time to copy the op's bytes, at the copy
bandwidth measured in the same run. kernels.csv and kernels.md are written again after every size.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from calls import Call, nothing, routing_calls
from clocks import capture, time_call
from inputs import DTYPES, make_inputs, parser, random_map, use_library
from routers import kernel_bytes
from targets import KERNELS, kernels_verdict
from timing import Estimate, copy_bandwidth, estimate, markdown_table, write_results

from emo_megatron.ops import dispatch

TOKENS = (65536, 8192, 262144)
"""In this order, the size of the target first: what does not fit the time is left out from the end."""
EXPERTS = (128, 512, 64, 256)
INTERLEAVED = (65536, 128, 8)
"""Tokens, experts and rows of the size whose neighbouring tokens belong to different documents."""
WIDTH, TOP_K = 2048, 8
DISPATCH = ((16384, 1), (16384, 8), (65536, 1), (65536, 8))
"""Tokens and ranks."""
ROTATED_BYTES, MOST_COPIES = 256 << 20, 8
ROUNDS = 15
ROUTING = ("document_scores", "select_pool", "pool_topk", "pool_topk backward")
METRICS = ("experts_used", "document_statistics")
"""Not in the sum of the routing ops: a run without metrics has none of them."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One op at one size."""

    kernel: str
    tokens: int
    experts: int
    dtype: str
    layout: str
    """packed, interleaved, or the number of ranks."""
    how: str
    seconds: list[float]
    num_bytes: int

    @cached_property
    def time(self) -> Estimate:
        """Of `seconds`; the bootstrap behind it is not free."""
        return estimate(self.seconds)

    def row(self, bandwidth: float) -> dict[str, Any]:
        """Of the CSV, times in microseconds."""
        found = self.time.scaled(1e6)
        floor = self.num_bytes / bandwidth * 1e6
        return {
            "kernel": self.kernel,
            "tokens": self.tokens,
            "experts": self.experts,
            "dtype": self.dtype,
            "layout": self.layout,
            "how": self.how,
            "median_us": round(found.median, 2),
            "low_us": round(found.low, 2),
            "high_us": round(found.high, 2),
            "bytes": self.num_bytes,
            "floor_us": round(floor, 4),
            "times_floor": round(found.median / floor, 2),
        }


def time_calls(calls: list[Call], *, device: torch.device, prepare: Call) -> list[float]:
    """Seconds of one of the calls, in every round; they run one after the other."""

    def all_calls() -> list[Any]:
        # kept until the last one is done, so that each writes memory of its own
        return [call() for call in calls]

    if device.type == "cuda":
        replay = capture(all_calls, prepare=prepare)
        rounds = ROUNDS
    else:
        prepare()
        replay, rounds = all_calls, 3
    replay()
    return [time_call(replay, device=device) / len(calls) for _ in range(rounds)]


def time_routing(
    num_tokens: int, num_experts: int, dtype: str, *, device: torch.device, num_rows: int = 1
) -> Iterator[Timed]:
    """Every routing op at one size."""
    make = partial(
        make_inputs,
        num_tokens=num_tokens,
        num_experts=num_experts,
        dtype=DTYPES[dtype],
        device=device,
        num_rows=num_rows,
    )
    one_size = num_tokens * num_experts * DTYPES[dtype].itemsize
    count = max(1, min(MOST_COPIES, ROTATED_BYTES // one_size)) if device.type == "cuda" else 2
    inputs = [make(seed=seed) for seed in range(count)]
    sizes = kernel_bytes(
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_documents=inputs[0].num_documents,
        logit_bytes=DTYPES[dtype].itemsize,
    )
    for name, calls, prepare in routing_calls(inputs):
        yield Timed(
            kernel=name,
            tokens=num_tokens,
            experts=num_experts,
            dtype=dtype,
            layout="packed" if num_rows == 1 else "interleaved",
            how=_how(device),
            seconds=time_calls(calls, device=device, prepare=prepare),
            num_bytes=sizes[name],
        )


def time_dispatch(num_tokens: int, num_ranks: int, *, device: torch.device, width: int) -> Iterator[Timed]:
    """Every dispatch op at one size, in bfloat16."""
    num_experts = 128
    map_TE = random_map(num_tokens, num_experts, TOP_K, device.type)
    count = partial(dispatch.count_sends, map_TE, num_ranks=num_ranks, backend="native")
    num_rows, num_pairs = int(count()[:num_ranks].sum()), num_tokens * TOP_K
    plan_send = partial(
        *(dispatch.plan_send, map_TE),
        **{"num_ranks": num_ranks, "num_rows": num_rows, "num_pairs": num_pairs},
        backend="native",
    )
    plan = plan_send()
    # as if every rank's rows were sent to one
    local = num_experts // num_ranks
    plan_receive = partial(
        *(dispatch.plan_receive, plan.codes_P), **{"num_rows": num_rows, "num_experts": local}, backend="native"
    )
    received = plan_receive()
    shape = num_rows, width
    rows_NH = torch.randn(shape, device=device).bfloat16()
    copy = partial(dispatch.copy_rows, rows_NH, fanout=received.pairs, backend="native")
    copies_PH = copy()
    add = partial(dispatch.sum_rows, copies_PH, fanout=received.pairs, backend="native")
    moved = 2 * width * (num_rows + num_pairs) + 8 * num_pairs + 8 * num_rows
    entries = num_tokens * num_experts
    calls = {
        "count_sends": (count, entries + 8 * (num_ranks + num_experts)),
        "plan_send": (plan_send, entries + 8 * (2 * num_rows + num_tokens) + 12 * num_pairs),
        "plan_receive": (plan_receive, 28 * num_pairs + 8 * num_rows),
        "copy_rows": (copy, moved),
        "sum_rows": (add, moved),
    }
    for name, (call, num_bytes) in calls.items():
        yield Timed(
            kernel=name,
            tokens=num_tokens,
            experts=num_experts,
            dtype="bfloat16",
            layout=f"{num_ranks} ranks",
            how=_how(device),
            seconds=time_calls([call], device=device, prepare=nothing),
            num_bytes=num_bytes,
        )


def _how(device: torch.device) -> str:
    return "graph replay" if device.type == "cuda" else "eager, on a CPU"


def cases(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Call]]:
    """What to time, the most valuable first: a name and what gives its Timed."""
    if "routing" in options.ops:
        yield from _routing_cases(options.tokens[:1], options.experts, device)
    if "dispatch" in options.ops:
        for T, ranks in ((512, 1), (512, 8)) if options.quick else DISPATCH:
            width = 64 if options.quick else WIDTH
            call = partial(time_dispatch, T, ranks, device=device, width=width)
            yield f"dispatch T={T} ranks={ranks}", call
    if "routing" in options.ops:
        yield from _routing_cases(options.tokens[1:], options.experts, device)


def _routing_cases(tokens: Sequence[int], experts: Sequence[int], device: torch.device) -> Iterator[tuple[str, Call]]:
    for T, E, dtype in product(tokens, experts, DTYPES):
        yield f"T={T} E={E} {dtype}", partial(time_routing, T, E, dtype, device=device)
        if (T, E, dtype) == (*INTERLEAVED[:2], "float32"):
            call = partial(time_routing, T, E, dtype, device=device, num_rows=INTERLEAVED[2])
            yield f"T={T} E={E} interleaved", call


def page_of(timed: list[Timed], bandwidth: float, device: torch.device, failed: list[str]) -> str:
    """All rows, the sums of the routing ops, and the verdict."""
    parts = [
        f"# Kernels, {_how(device)}\n",
        f"Copy bandwidth {bandwidth / 1e9:.0f} GB/s, read and written. Microseconds a call, medians.\n",
    ]
    parts += [f"Failed: {problem}\n" for problem in failed]
    sums, head = [], ("T", "E", "dtype", "ids or ranks")
    at_target = None
    for size in dict.fromkeys((x.tokens, x.experts, x.dtype, x.layout) for x in timed):
        found_here = {x.kernel: x for x in timed if (x.tokens, x.experts, x.dtype, x.layout) == size}
        if not set(ROUTING) <= found_here.keys():
            continue
        here = [found_here[name] for name in ROUTING]
        floor = sum(x.num_bytes for x in here) / bandwidth
        total = estimate([sum(times) for times in zip(*(x.seconds for x in here), strict=True)])
        found = total.scaled(1 / floor)
        cells = [f"{x.time.median * 1e6:.1f}" for x in here]
        sums.append([*map(str, size), *cells, f"{total.median * 1e6:.1f}", f"{found.median:.2f}"])
        if size == (KERNELS.num_tokens, KERNELS.num_experts, "float32", "packed"):
            at_target = found
    parts.append(f"- {kernels_verdict(at_target, device=device)}\n")
    if sums:
        parts.append("## Routing\n")
        parts.append(markdown_table([*head, *ROUTING, "sum, us", "x floor"], sums))
    others = {
        "Metrics": [x for x in timed if x.kernel in METRICS],
        "Dispatch, bfloat16, K=8": [x for x in timed if x.kernel not in ROUTING + METRICS],
    }
    keys = ("kernel", "tokens", "experts", "layout", "median_us", "floor_us", "times_floor")
    for title, found_there in others.items():
        rows = [x.row(bandwidth) for x in found_there]
        if rows:
            parts.append(f"## {title}\n")
            parts.append(markdown_table(keys, [[str(row[key]) for key in keys] for row in rows]))
    return "\n".join(parts)


def main() -> int:
    """Time one size after the other; a size that fails is reported and left out."""
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--quick", action="store_true", help="time one small size only")
    add("--ops", nargs="+", default=["routing", "dispatch"], choices=("routing", "dispatch"))
    add("--tokens", type=int, nargs="+", default=TOKENS)
    add("--experts", type=int, nargs="+", default=EXPERTS)
    add("--library", type=Path, help="library of compiled ops to time; default: the library of the package")
    options = arguments.parse_args()
    if options.quick:
        options.tokens, options.experts = (1024,), (64,)
    use_library(options.library)
    device = torch.device(options.device)
    bandwidth = copy_bandwidth(device)
    timed: list[Timed] = []
    failed: list[str] = []
    for name, call in cases(options, device):
        started = time.monotonic()
        try:
            timed += call()
        # too little memory, a graph that cannot be captured: the other sizes still count
        except RuntimeError as error:
            failed.append(f"{name}: {str(error).splitlines()[0]}")
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        if timed:
            rows = [x.row(bandwidth) for x in timed]
            page = page_of(timed, bandwidth, device, failed)
            write_results(options.output, "kernels", rows=rows, page=page)
    print("; ".join(failed) or f"{len(timed)} times at {bandwidth / 1e9:.0f} GB/s, {_how(device)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
