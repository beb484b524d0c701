"""Run every op once, in float32 and bfloat16; compare with a float64 loop or the reference implementation on the CPU.

Prints one line per op. To add an op, add an entry to OPERATORS.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from inputs import (
    DTYPES,
    SCORINGS,
    Inputs,
    gradient,
    make_inputs,
    outputs,
    parser,
    random_map,
    route,
    scores_of,
    upstream,
)
from loops import pools_by_loop, route_by_loop, scores_by_loop
from torch import Tensor

from emo_megatron import ops
from emo_megatron.ops import dispatch
from emo_megatron.ops.reference import SCORE_FRACTION_BITS

EXPERTS, WIDTH, RANKS = 128, 256, 4
PADDING = 37
TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-7}
"""Of the largest entry, for what is a float."""
Case = tuple[str, str]
"""What was checked, and what is wrong with it; empty if nothing."""


def check_document_scores(tokens: int, device: str) -> Iterator[Case]:
    """Sums of softmax, in fixed point."""
    for name, inputs in _inputs(tokens):
        got_DE = scores_of(inputs.to(device)).cpu().double() / 2**SCORE_FRACTION_BITS
        yield name, _far(got_DE, scores_by_loop(inputs), 1e-5)


def check_select_pool(tokens: int, device: str) -> Iterator[Case]:
    """Equal scores, all of them, and scores below zero among others."""
    scores_DE = scores_of(make_inputs(num_tokens=tokens, num_experts=EXPERTS, document_tokens=tokens // 8))
    scores_DE[0] = 5
    scores_DE[1] -= scores_DE[1].max() // 2
    sizes_D = torch.randint(0, EXPERTS + 2, (len(scores_DE),))
    got_DE = ops.select_pool(scores_DE.to(device), pool_sizes_D=sizes_D.to(device), backend="native")
    yield "int64", _unequal(got_DE, pools_by_loop(scores_DE, sizes_D))


def check_pool_topk(tokens: int, device: str) -> Iterator[Case]:
    """Choice, weights, counts, losses' inputs and the gradient."""
    for name, inputs in _inputs(tokens):
        pool_DE = pools_by_loop(scores_by_loop(inputs), inputs.sizes_D)
        for scoring in SCORINGS:
            moved, pool_there_DE = inputs.to(device), pool_DE.to(device)
            got = {key: x.cpu() for key, x in outputs(route(moved, pool_there_DE, scoring))}
            got["gradient"] = gradient(moved, pool_there_DE, scoring).cpu()
            yield f"{name}, {scoring}", _routing_problem(got, inputs, pool_DE, scoring, name)


def _routing_problem(got: dict[str, Tensor], inputs: Inputs, pool_DE: Tensor, scoring: str, dtype: str) -> str:
    leaf_TE = inputs.logits_TE.double().requires_grad_()
    moved = Inputs(logits_TE=leaf_TE, document_ids_T=inputs.document_ids_T, sizes_D=inputs.sizes_D, top_k=inputs.top_k)
    want = route_by_loop(moved, pool_DE, scoring)
    is_clear_T, is_padding_T = want.is_clear_T, inputs.document_ids_T < 0
    problems = []
    if (is_clear_T | is_padding_T).float().mean() < 0.99:
        problems.append("too many near ties")
    if got["probs_TE"][is_padding_T].any() or got["z_T"][is_padding_T].any():
        problems.append("padding has weight")
    if not torch.equal(got["routing_map_TE"][is_clear_T], want.routing_map_TE[is_clear_T]):
        problems.append("other experts")
    counts_E = got["routing_map_TE"][~is_padding_T].sum(0)
    if not torch.equal(got["tokens_per_expert_E"], counts_E):
        problems.append("counts differ from the map")
    found = want.probs_TE, want.score_sums_E, want.z_T
    # as the compiled op gets them: rounded to its dtype
    gradients = [upstream(got[key]).double() for key in ("probs_TE", "score_sums_E", "z_T")]
    (grad_TE,) = torch.autograd.grad(found, [leaf_TE], gradients)
    for key, want_X in {"probs_TE": want.probs_TE, "z_T": want.z_T, "gradient": grad_TE}.items():
        if far := _far(got[key][is_clear_T], want_X[is_clear_T], TOLERANCE[dtype]):
            problems.append(f"{key}: {far}")
    if far := _far(got["score_sums_E"], want.score_sums_E, 1e-4):
        problems.append(f"score_sums_E: {far}")
    return "; ".join(problems)


def check_dispatch(name: str, tokens: int, device: str) -> Iterator[Case]:
    """One of the dispatch ops: integers as the definition has them, sums of rows as float64 has them."""
    map_TE = random_map(tokens, EXPERTS, 8, "cpu")
    for num_ranks in (1, RANKS):
        counts_X = dispatch.count_sends(map_TE, num_ranks=num_ranks, backend="reference")
        num_rows, num_pairs = (int(x.sum()) for x in (counts_X[:num_ranks], counts_X[num_ranks:]))
        sizes = {"num_ranks": num_ranks, "num_rows": num_rows, "num_pairs": num_pairs}
        plan = dispatch.plan_send(map_TE, **sizes, backend="reference")
        local = EXPERTS // num_ranks
        if name == "count_sends":
            call = partial(dispatch.count_sends, num_ranks=num_ranks)
            yield f"{num_ranks} ranks", _differs_from_definition(call, (map_TE,), device)
        elif name == "plan_send":
            call = partial(dispatch.plan_send, **sizes)
            yield f"{num_ranks} ranks", _differs_from_definition(call, (map_TE,), device)
        elif name == "plan_receive":
            call = partial(dispatch.plan_receive, num_rows=num_rows, num_experts=local)
            yield f"{num_ranks} ranks", _differs_from_definition(call, (plan.codes_P,), device)
        else:
            for dtype in DTYPES:
                problem = _row_problem(name, plan.rows, num_rows, tokens, dtype, device)
                yield f"{num_ranks} ranks, {dtype}", problem


def _row_problem(name: str, rows: dispatch.Fanout, num_copies: int, num_rows: int, dtype: str, device: str) -> str:
    is_copy = name == "copy_rows"
    shape = (num_rows if is_copy else num_copies, WIDTH)
    values_XH = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    moved = dispatch.Fanout(*(part.to(device) for part in rows))
    leaf_XH = values_XH.to(device).requires_grad_()
    op = getattr(dispatch, name)
    got_XH = op(leaf_XH, fanout=moved, backend="native")
    (got_grad_XH,) = torch.autograd.grad(got_XH, [leaf_XH], upstream(got_XH))
    grad_XH = upstream(got_XH).cpu().double()

    def copied(x: Tensor) -> Tensor:
        return x.double()[rows.source_P]

    def summed(x: Tensor) -> Tensor:
        zero = torch.zeros(num_rows, WIDTH, dtype=torch.float64)
        return zero.index_add(0, rows.source_P, x.double())

    forward, backward = (copied, summed) if is_copy else (summed, copied)
    tolerance = 1e-6 if dtype == "float32" else 2.0**-8
    problems = [
        _far(got_XH.detach().cpu(), forward(values_XH), tolerance),
        _far(got_grad_XH.cpu(), backward(grad_XH), tolerance),
    ]
    return "; ".join(filter(None, problems))


def check_definition(call: Callable[..., Any], *arguments: Tensor) -> Callable[..., Iterator[Case]]:
    """An op that has one implementation: the same on the device as on the CPU."""

    def check(tokens: int, device: str) -> Iterator[Case]:
        there = call(*(x.to(device) for x in arguments))
        yield "as on the CPU", _unequal(there, call(*arguments))

    return check


def check_against_reference(call: Callable[..., Tensor], *arguments: Tensor) -> Callable[..., Iterator[Case]]:
    """An op of integers: the compiled one gives the definition's."""

    def check(_: int, device: str) -> Iterator[Case]:
        there = call(*(x.to(device) for x in arguments), backend="native")
        yield "int64", _unequal(there, call(*arguments, backend="reference"))

    return check


def check_statistics(tokens: int, device: str) -> Iterator[Case]:
    """Counts are the definition's; the summed entropy is its to rounding."""
    inputs = make_inputs(num_tokens=tokens, num_experts=EXPERTS, padding=PADDING)
    scores_DE = scores_of(inputs)
    pool_DE = pools_by_loop(scores_DE, inputs.sizes_D)
    used_DW = ops.experts_used(
        random_map(tokens, EXPERTS, inputs.top_k, "cpu"),
        document_ids_T=inputs.document_ids_T,
        num_documents=inputs.num_documents,
        backend="reference",
    )
    want = ops.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW, backend="reference")
    got = ops.document_statistics(
        scores_DE.to(device), pool_DE=pool_DE.to(device), used_DW=used_DW.to(device), backend="native"
    ).cpu()
    yield "counts", _unequal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
    yield "entropy", _far(got[2:3], want[2:3].double(), 1e-5)


def _differs_from_definition(call: Callable[..., Any], arguments: tuple[Tensor, ...], device: str) -> str:
    got = call(*(x.to(device) for x in arguments), backend="native")
    return _unequal(got, call(*arguments, backend="reference"))


def _inputs(tokens: int) -> Iterator[tuple[str, Inputs]]:
    for name, dtype in DTYPES.items():
        found = make_inputs(num_tokens=tokens, num_experts=EXPERTS, dtype=dtype, padding=PADDING)
        yield name, found


def _far(got_X: Tensor, want_X: Tensor, tolerance: float) -> str:
    """Empty within so much of the largest."""
    error = ((got_X.double() - want_X).abs().max() / want_X.abs().max()).item()
    return "" if error <= tolerance else f"differs by {error:.1e} of the largest"


def _unequal(got: Any, want: Any) -> str:
    """Empty if every tensor within is the same."""
    if isinstance(want, Tensor):
        count = (got.cpu() != want).sum().item() if got.shape == want.shape else want.numel()
        return f"{count} of {want.numel()} differ" if count else ""
    parts = {
        key: _unequal(getattr(got, key), getattr(want, key)) for key in getattr(want, "_fields", None) or want.__slots__
    }
    return "; ".join(f"{key}: {problem}" for key, problem in parts.items() if problem)


_POSITIONS_D = torch.arange(300)
_SCORES_DE = torch.randint(0, 1 << 40, (300, EXPERTS), generator=torch.Generator().manual_seed(0))
_DRAW = {"layer_number": 3, "seed": 5, "low": 8, "high": 128, "num_experts": EXPERTS}
OPERATORS: dict[str, Callable[[int, str], Iterator[Case]]] = {
    "document_scores": check_document_scores,
    "select_pool": check_select_pool,
    "pool_topk": check_pool_topk,
    **{
        name: partial(check_dispatch, name)
        for name in ("count_sends", "plan_send", "plan_receive", "copy_rows", "sum_rows")
    },
    "draw_pool_sizes": check_definition(
        lambda positions_D: ops.draw_pool_sizes(positions_D, offsets_D=positions_D * 7, **_DRAW), _POSITIONS_D
    ),
    "top_p_pool_sizes": check_definition(
        lambda scores_DE: ops.top_p_pool_sizes(scores_DE, top_p=0.7, low=8, high=128), _SCORES_DE
    ),
    "document_tokens": check_definition(
        lambda logits_TE, ids_T: ops.document_tokens(logits_TE, document_ids_T=ids_T, num_documents=10),
        _SCORES_DE.float(),
        _POSITIONS_D // 30,
    ),
    "biased_scores": check_definition(ops.biased_scores, _SCORES_DE, _POSITIONS_D, torch.linspace(-1.0, 1.0, EXPERTS)),
    "limit_to_groups": check_definition(
        lambda scores_DE, sizes_D: torch.cat(
            [
                x.reshape(len(sizes_D), -1)
                for x in ops.limit_to_groups(scores_DE, sizes_D, num_groups=8, group_topk=4, top_k=8)
            ],
            dim=1,
        ),
        _SCORES_DE,
        _POSITIONS_D,
    ),
    "draw_bits": check_against_reference(
        lambda positions_D, backend: ops.draw_bits(
            positions_D, positions_D * 7, layers=range(1, 9), seed=5, backend=backend
        ),
        _POSITIONS_D,
    ),
    "experts_used": check_against_reference(
        lambda map_TE, ids_T, backend: ops.experts_used(
            map_TE, document_ids_T=ids_T, num_documents=10, backend=backend
        ),
        random_map(300, EXPERTS, 8, "cpu"),
        _POSITIONS_D // 30,
    ),
    "document_statistics": check_statistics,
}


def main() -> int:
    """Print a line an op and case, and at the end how many are wrong."""
    options = parser(__doc__, tokens=4096).parse_args()
    checked = wrong = 0
    for name, check in OPERATORS.items():
        try:
            for case, problem in check(options.tokens, options.device):
                checked += 1
                wrong += bool(problem)
                print(f"{name}, {case}: {problem or 'ok'}", flush=True)
        # whatever one op does, the others get their turn
        except Exception as error:
            checked += 1
            wrong += 1
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    print(f"T={options.tokens} E={EXPERTS} on {options.device}: {checked} cases, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
