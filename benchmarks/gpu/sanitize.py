"""Twelve small cases of all ops for compute-sanitizer, with sizes below and above the unit sizes of the kernels.

Inputs are made on the CPU, so that almost only kernels of the ops are checked. Results are compared with the CPU's
kernels; integers must be equal.
"""

from __future__ import annotations

import sys

import torch
from inputs import (
    DTYPES,
    Inputs,
    differentiable,
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

from emo_megatron import ops
from emo_megatron.ops import dispatch
from emo_megatron.ops.reference import SCORE_FRACTION_BITS

# tokens, experts, rows whose documents take turns; padding follows from the size
SIZES = ((1, 8, 1), (33, 64, 1), (257, 128, 1), (96, 130, 3), (520, 256, 4), (65, 512, 1))
WIDTHS = (64, 7)
"""Of rows: a multiple of sixteen bytes and not."""


def main() -> int:
    """Print a line a case; returns the exit status."""
    options = parser(__doc__).parse_args()
    wrong = 0
    for case, (name, dtype) in ((case, kind) for case in SIZES for kind in DTYPES.items()):
        tokens, experts, rows = case
        here = make_inputs(
            num_tokens=tokens, num_experts=experts, dtype=dtype, document_tokens=20, num_rows=rows, padding=tokens // 10
        )
        problems = [
            *_routing(here, options.device),
            *_documents(here, options.device),
            *_dispatch(here, options.device),
        ]
        wrong += bool(problems)
        print(f"T={tokens} E={experts} {name}: {', '.join(problems) or 'ok'}", flush=True)
    print(f"{2 * len(SIZES)} cases, {wrong} differ from the CPU")
    return 1 if wrong else 0


def _routing(here: Inputs, device: str) -> list[str]:
    """Names of what differs."""
    found: list[dict[str, Tensor]] = []
    pool_DE = pools_of(here)
    for where in ("cpu", device):
        inputs = here.to(where)
        leaf_TE = inputs.logits_TE.detach().requires_grad_()
        moved = Inputs(
            logits_TE=leaf_TE, document_ids_T=inputs.document_ids_T, sizes_D=inputs.sizes_D, top_k=inputs.top_k
        )
        routing = route(moved, pool_DE.to(where))
        results = differentiable(routing)
        # made on the CPU
        gradients = [upstream(x.detach().cpu()).to(where) for x in results]
        (grad_TE,) = torch.autograd.grad(results, [leaf_TE], gradients)
        named = {"scores": scores_of(inputs), **dict(outputs(routing)), "gradient": grad_TE}
        found.append({name: x.detach().cpu().double() for name, x in named.items()})
    want, got = found
    for named in found:
        named["scores"] /= 2**SCORE_FRACTION_BITS
    tolerance = 1e-4 if here.logits_TE.dtype == torch.float32 else 1e-2
    return [
        name for name, want_X in want.items() if not torch.allclose(got[name], want_X, rtol=tolerance, atol=tolerance)
    ]


def _documents(here: Inputs, device: str) -> list[str]:
    """Names of what differs: only a sum of entropies may, in its last digits."""
    num_tokens, num_experts = here.logits_TE.shape
    map_TE = random_map(num_tokens, num_experts, here.top_k, "cpu")
    scores_DE, pool_DE = scores_of(here), pools_of(here)
    found: list[dict[str, Tensor]] = []
    for where in ("cpu", device):
        inputs = here.to(where)
        used_DW = ops.experts_used(
            map_TE.to(where), document_ids_T=inputs.document_ids_T, num_documents=inputs.num_documents, backend="native"
        )
        statistics = ops.document_statistics(
            scores_DE.to(where), pool_DE=pool_DE.to(where), used_DW=used_DW, backend="native"
        )
        positions_D = torch.arange(inputs.num_documents, device=where)
        bits_LD = ops.draw_bits(positions_D, positions_D * 3, layers=range(1, 4), seed=1, backend="native")
        named = {"experts used": used_DW, "statistics": statistics, "bits": bits_LD}
        found.append({name: x.cpu() for name, x in named.items()})
    want, got = found
    is_near = torch.allclose(got["statistics"].double(), want["statistics"].double(), rtol=1e-5)
    equal = {name: torch.equal(got[name], want[name]) for name in ("experts used", "bits")}
    return [name for name, is_right in (equal | {"statistics": is_near}).items() if not is_right]


def _dispatch(here: Inputs, device: str) -> list[str]:
    """Names of what differs: nothing may."""
    num_tokens, num_experts = here.logits_TE.shape
    map_TE = random_map(num_tokens, num_experts, here.top_k, "cpu")
    found = []
    for where in ("cpu", device):
        results: dict[str, Tensor] = {}
        for num_ranks in (1, 2):
            counts_X = dispatch.count_sends(map_TE.to(where), num_ranks=num_ranks, backend="native")
            num_rows, num_pairs = int(counts_X[:num_ranks].sum()), num_tokens * here.top_k
            plan = dispatch.plan_send(
                map_TE.to(where), num_ranks=num_ranks, num_rows=num_rows, num_pairs=num_pairs, backend="native"
            )
            received = dispatch.plan_receive(
                plan.codes_P, num_rows=num_rows, num_experts=num_experts // num_ranks, backend="native"
            )
            names = ("counts", "places", "codes", "order", "sources")
            values = (counts_X, plan.places_P, plan.codes_P, received.order_P, plan.rows.source_P)
            for width in WIDTHS:
                generator = torch.Generator().manual_seed(width)
                numbers_TH = torch.randn(num_tokens, width, generator=generator)
                rows_NH = numbers_TH.to(here.logits_TE.dtype).to(where)
                sent_NH = dispatch.copy_rows(rows_NH, fanout=plan.rows, backend="native")
                copies_PH = dispatch.copy_rows(sent_NH, fanout=received.pairs, backend="native")
                back_NH = dispatch.sum_rows(copies_PH, fanout=received.pairs, backend="native")
                sums_TH = dispatch.sum_rows(back_NH, fanout=plan.rows, backend="native")
                results |= {f"copies {width}": copies_PH, f"sums {width}": sums_TH}
            results |= {f"{name} {num_ranks}": x for name, x in zip(names, values, strict=True)}
        found.append({name: x.cpu() for name, x in results.items()})
    want, got = found
    return [name for name, want_X in want.items() if not torch.equal(got[name], want_X)]


if __name__ == "__main__":
    sys.exit(main())
