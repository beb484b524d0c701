"""Checks that the tests of the ops do not cover. Runs one or several checks and prints one verdict per line.

first-capture   the very first call is inside the capture of a CUDA graph
other-stream    calls on a stream other than the default stream
compile         torch.compile, forward and backward
equal-bits      the same bits in 20 runs
decisions       how often GPU and CPU kernels choose differently, and how close the scores were
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from inputs import (
    DTYPES,
    SCORINGS,
    Inputs,
    differentiable,
    gradient,
    make_inputs,
    outputs,
    parser,
    pools_of,
    random_map,
    route,
    scores_of,
    upstream,
)
from torch import Tensor

from emo_megatron.ops import dispatch

EXPERTS = 128
RUNS = 20
CLOSE = 1e-5
"""Of the deciding keys, relative: below, float32 in another order may decide otherwise."""
Named = dict[str, Tensor]


def first_capture(options: argparse.Namespace) -> str:
    """Nothing of the ops has run, not even what loads the kernels."""
    inputs = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device)
    map_TE = random_map(options.tokens, EXPERTS, 8, options.device)
    # torch's own first times, a thread for gradients for instance, are not what is asked
    leaf = torch.ones(8, device=options.device, requires_grad=True)
    torch.autograd.grad(leaf.square(), leaf, upstream(leaf))
    if options.device == "cpu":
        captured = _all_ops(inputs, map_TE)
        where = "a CPU has no graphs: called twice"
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _all_ops(inputs, map_TE)
        graph.replay()
        torch.cuda.synchronize()
        where = "captured, replayed"
    _same(captured, _all_ops(inputs, map_TE))
    return f"{where}; {len(captured)} results equal those of a plain call"


def other_stream(options: argparse.Namespace) -> str:
    """Inputs made on the stream itself, behind work that a wrong stream would not wait for."""
    is_cpu = options.device == "cpu"
    map_TE = random_map(options.tokens, EXPERTS, 8, options.device)
    want = _all_ops(make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device), map_TE)
    stream = None if is_cpu else torch.cuda.Stream()
    for _ in range(1 if is_cpu else 10):
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            if stream is not None:
                # the map is another stream's
                stream.wait_stream(torch.cuda.default_stream())
                large = torch.ones(1 << 27, device=options.device)
                for _ in range(20):
                    large.mul_(1.0)
            inputs = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device)
            got = _all_ops(inputs, map_TE.clone())
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        _same(got, want)
    return f"{'a CPU has no streams: called once' if is_cpu else '10 runs'}; {len(want)} results equal"


def compiled(options: argparse.Namespace) -> str:
    """The whole of routing as one graph, without a break."""
    inputs = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device)

    def step(logits_TE: Tensor) -> tuple[Tensor, ...]:
        moved = Inputs(
            logits_TE=logits_TE, document_ids_T=inputs.document_ids_T, sizes_D=inputs.sizes_D, top_k=inputs.top_k
        )
        return differentiable(route(moved, pools_of(moved)))

    def run(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Named:
        leaf_TE = inputs.logits_TE.clone().requires_grad_()
        found = function(leaf_TE)
        grads = [upstream(x) for x in found]
        (grad_TE,) = torch.autograd.grad(found, [leaf_TE], grads)
        return {"probs": found[0], "score sums": found[1], "z": found[2], "gradient": grad_TE}

    # first, which loads the library: tracing cannot
    want = run(step)
    got = run(torch.compile(step, fullgraph=True, backend=options.compiler))
    _same(got, want)
    return f"torch.compile with {options.compiler}: {len(got)} results equal eager ones"


def equal_bits(options: argparse.Namespace) -> str:
    """Forward and backward, and the dispatch ops."""
    inputs = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device)
    map_TE = random_map(options.tokens, EXPERTS, 8, options.device)
    first = _all_ops(inputs, map_TE)
    for _ in range(RUNS - 1):
        _same(_all_ops(inputs, map_TE), first)
    return f"{RUNS} runs at T={options.tokens}, {len(first)} results: the same bits"


def decisions(options: argparse.Namespace) -> str:
    """Pools and choices, the deciding gap being that between the last one taken and the first one left."""
    problems = []
    print("| decision | of | differ | gap up to | near ties, below 1e-6 |")
    print("| --- | --: | --: | --: | --: |")
    for name, (here_XE, there_XE, keys_XE) in _decisions(options):
        differs_X = (here_XE != there_XE).any(-1)
        gap_X = _gap(keys_XE, here_XE)
        largest = gap_X[differs_X].max().item() if differs_X.any() else 0.0
        ties = (gap_X < 1e-6).sum().item()
        print(f"| {name} | {len(gap_X)} | {differs_X.sum()} | {largest:.1e} | {ties} |")
        if largest > CLOSE:
            problems.append(f"{name} differ although keys are {largest:.1e} apart")
    if problems:
        raise AssertionError("; ".join(problems))
    return f"T={options.tokens}: no decision differs where keys are more than {CLOSE} apart"


def _decisions(options: argparse.Namespace) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """By name: what the CPU decides, what the device does, and by which keys."""
    for dtype_name, dtype in DTYPES.items():
        here = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, dtype=dtype)
        there = here.to(options.device)
        pool_DE = pools_of(here)
        pools = pool_DE, pools_of(there).cpu(), scores_of(here).double()
        yield f"pools, {dtype_name}", pools
        allowed_TE = pool_DE[here.document_ids_T]
        for scoring in SCORINGS:
            logits_TE = here.logits_TE.double()
            keys_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE
            map_TE = route(here, pool_DE, scoring).routing_map_TE
            # the CPU's pools, so that a pool that differs is not counted again
            map_there_TE = route(there, pool_DE.to(options.device), scoring).routing_map_TE
            masked_TE = keys_TE.masked_fill(~allowed_TE, float("-inf"))
            yield f"choices, {scoring}, {dtype_name}", (map_TE, map_there_TE.cpu(), masked_TE)


def _gap(keys_XE: Tensor, taken_XE: Tensor) -> Tensor:
    """[X]: between the lowest taken key and the highest that is not, relative to the former; inf if all are taken."""
    infinite = float("inf")
    lowest_X = keys_XE.masked_fill(~taken_XE, infinite).amin(-1)
    highest_X = keys_XE.masked_fill(taken_XE, -infinite).amax(-1)
    return (lowest_X - highest_X) / lowest_X.abs().clamp(min=1e-6)


def _all_ops(inputs: Inputs, map_TE: Tensor) -> Named:
    """Every result of every op."""
    scores_DE = scores_of(inputs)
    pool_DE = pools_of(inputs)
    found = {"scores": scores_DE, "pool": pool_DE, **dict(outputs(route(inputs, pool_DE)))}
    found["gradient"] = gradient(inputs, pool_DE)
    num_tokens, num_experts = map_TE.shape
    num_pairs = 8 * num_tokens
    found["counts"] = dispatch.count_sends(map_TE, num_ranks=1, backend="native")
    plan = dispatch.plan_send(map_TE, num_ranks=1, num_rows=num_tokens, num_pairs=num_pairs, backend="native")
    received = dispatch.plan_receive(plan.codes_P, num_rows=num_tokens, num_experts=num_experts, backend="native")
    found |= {"places": plan.places_P, "codes": plan.codes_P, "order": received.order_P}
    rows_TH = inputs.logits_TE.detach()
    copies_PH = dispatch.copy_rows(rows_TH, fanout=received.pairs, backend="native")
    sums_TH = dispatch.sum_rows(copies_PH, fanout=received.pairs, backend="native")
    return found | {"copies": copies_PH, "sums": sums_TH}


def _same(got: Named, want: Named) -> None:
    wrong = [name for name, value in want.items() if not torch.equal(got[name], value)]
    if wrong:
        raise AssertionError(f"{', '.join(wrong)} differ")


CHECKS = {
    "first-capture": first_capture,
    "other-stream": other_stream,
    "compile": compiled,
    "equal-bits": equal_bits,
    "decisions": decisions,
}


def main() -> int:
    """Run those that are asked for; returns the exit status."""
    arguments = parser(__doc__, tokens=4096)
    arguments.add_argument("checks", nargs="+", choices=list(CHECKS))
    arguments.add_argument("--compiler", default="inductor", help="backend of torch.compile")
    options = arguments.parse_args()
    wrong = []
    for name in options.checks:
        try:
            print(f"{name}: {CHECKS[name](options)}", flush=True)
        # whatever one does, the others get their turn
        except Exception as error:
            wrong.append(name)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    if len(options.checks) > 1 or wrong:
        print(f"{len(options.checks)} checks; wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
