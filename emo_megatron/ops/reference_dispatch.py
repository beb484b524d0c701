"""The dispatch ops in plain PyTorch, the reference implementation: each token is sent to each rank at most once.

Shapes: T tokens on this rank, E experts, R ranks, H hidden size, N rows, P pairs. Rank r holds the experts
[r * E / R, (r + 1) * E / R). A row is one token sent to one rank. A pair is one token and one of its experts. The
sender orders rows by (rank, token) and pairs by (rank, token, expert). The receiver orders pairs by (expert, row).

A row is copied to its pairs, and copies are summed back to their row. Each operation is the gradient of the other, so
one relation, a `Fanout`, describes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Fanout(NamedTuple):
    """The row of every copy, and the copies of every row."""

    source_P: Tensor
    """[P] int64, the row of each copy."""
    copies_P: Tensor
    """[P] int64, the copies of row 0, then the copies of row 1, and so on."""
    bounds_N: Tensor
    """[N + 1] int64, the index in `copies_P` of the first copy of each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SendPlan:
    """Rows and pairs that a rank sends."""

    rows: Fanout
    """Tokens to rows."""
    places_P: Tensor
    """[P] int64, the index of each pair in the flattened [T, E] probabilities."""
    codes_P: Tensor
    """[P] int32, a code of each pair for the receiver: 2 * (index of the expert on the receiver), plus 1 for the first
    pair of a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivePlan:
    """Order of the pairs of the rows that a rank received."""

    pairs: Fanout
    """Rows to pairs, sorted by expert."""
    order_P: Tensor
    """[P] int64, for each pair in sorted order its index in received order."""


def count_sends(routing_map_TE: Tensor, *, num_ranks: int) -> Tensor:
    """Numbers of rows and pairs that this rank will send.

    Args:
        routing_map_TE: [T, E] bool.
        num_ranks: R, a divisor of E.

    Returns:
        [R + E] int64: rows per rank, then pairs per expert.
    """
    rows_R = _rank_map(routing_map_TE, num_ranks).any(-1).sum(1)
    return torch.cat([rows_R, routing_map_TE.sum(0)])


def plan_send(routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int) -> SendPlan:
    """Order the rows and pairs to send.

    Args:
        routing_map_TE: [T, E] bool.
        num_ranks: R, a divisor of E.
        num_rows: N, the sum of the first R values of `count_sends`.
        num_pairs: P, the sum of the other values of `count_sends`.

    Returns:
        The plan. If there are fewer than `num_pairs` pairs, the remaining places and codes are 0. The compiled ops on a
        CPU raise an error for wrong sizes.
    """
    num_tokens, num_experts = routing_map_TE.shape
    per_rank = num_experts // num_ranks
    rank_map = _rank_map(routing_map_TE, num_ranks)
    rank_P, token_P, expert_P = rank_map.nonzero_static(size=num_pairs).unbind(1)
    visit_P = rank_P * num_tokens + token_P
    is_first_P = torch.ones_like(visit_P, dtype=torch.bool)
    is_first_P[1:] = visit_P[1:] != visit_P[:-1]
    places_P = token_P * num_experts + rank_P * per_rank + expert_P
    is_pair_P = rank_P >= 0
    token_N = rank_map.any(-1).nonzero_static(size=num_rows)[:, 1].contiguous()
    return SendPlan(
        rows=fan_out(token_N, num_sources=num_tokens),
        places_P=places_P * is_pair_P,
        codes_P=((expert_P * 2 + is_first_P) * is_pair_P).int(),
    )


def plan_receive(codes_P: Tensor, *, num_rows: int, num_experts: int) -> ReceivePlan:
    """Sort the pairs of received rows by expert.

    Args:
        codes_P: [P] int32, the senders' SendPlan.codes_P, concatenated.
        num_rows: N, number of received rows.
        num_experts: E / R, experts on this rank. Only the compiled ops, which sort by counting, use the number.
    """
    row_P = (codes_P & 1).long().cumsum(0) - 1
    order_P = (codes_P >> 1).argsort(stable=True)
    return ReceivePlan(pairs=fan_out(row_P.index_select(0, order_P), num_sources=num_rows), order_P=order_P)


def fan_out(source_P: Tensor, *, num_sources: int) -> Fanout:
    """The relation in which copy p belongs to row `source_P[p]`, an integer in [0, num_sources)."""
    counts_N = torch.zeros(num_sources + 1, dtype=torch.int64, device=source_P.device)
    counts_N.index_add_(0, source_P + 1, torch.ones_like(source_P))
    return Fanout(source_P=source_P, copies_P=source_P.argsort(stable=True), bounds_N=counts_N.cumsum(0))


def copy_rows(rows_NH: Tensor, *, fanout: Fanout) -> Tensor:
    """Copy rows: [P, H]."""
    return rows_NH[fanout.source_P]


def sum_rows(copies_PH: Tensor, *, fanout: Fanout) -> Tensor:
    """Sum each row's copies in order: [N, H], summed in float32 or better and rounded once."""
    # embedding_bag gathers and adds in the given order; it rounds each partial sum of half-precision input, so float32
    is_half = copies_PH.dtype.itemsize < 4
    wide_PH = copies_PH.float() if is_half else copies_PH.contiguous()
    sums_NH = embedding_bag(fanout.copies_P, wide_PH, fanout.bounds_N, mode="sum", include_last_offset=True)
    return sums_NH.to(copies_PH.dtype)


def _rank_map(routing_map_TE: Tensor, num_ranks: int) -> Tensor:
    """[R, T, E / R] bool."""
    num_tokens, num_experts = routing_map_TE.shape
    if num_experts % num_ranks:
        raise ValueError(
            f"the number of experts must be a multiple of the number of ranks; got {num_experts} experts, "
            f"{num_ranks} ranks"
        )
    return routing_map_TE.view(num_tokens, num_ranks, num_experts // num_ranks).transpose(0, 1)
