"""Launch every kernel of the ops once, at the target's size, for profiling with ncu."""

from __future__ import annotations

import torch
from inputs import gradient, make_inputs, parser, pools_of, random_map

from emo_megatron.ops import dispatch

EXPERTS, TOP_K, WIDTH = 128, 8, 2048


def main() -> None:
    """Routing, then dispatch."""
    options = parser(__doc__, tokens=65536).parse_args()
    inputs = make_inputs(num_tokens=options.tokens, num_experts=EXPERTS, device=options.device)
    gradient(inputs, pools_of(inputs))
    map_TE = random_map(options.tokens, EXPERTS, TOP_K, options.device)
    pairs = options.tokens * TOP_K
    plan = dispatch.plan_send(map_TE, num_ranks=1, num_rows=options.tokens, num_pairs=pairs, backend="native")
    received = dispatch.plan_receive(plan.codes_P, num_rows=options.tokens, num_experts=EXPERTS, backend="native")
    rows_NH = torch.ones(options.tokens, WIDTH, dtype=torch.bfloat16, device=options.device)
    copies_PH = dispatch.copy_rows(rows_NH, fanout=received.pairs, backend="native")
    sums_NH = dispatch.sum_rows(copies_PH, fanout=received.pairs, backend="native")
    if not torch.equal(sums_NH, rows_NH * TOP_K):
        raise AssertionError("the sums of the copies are wrong")
    print(f"launched at T={options.tokens} on {options.device}")


if __name__ == "__main__":
    main()
