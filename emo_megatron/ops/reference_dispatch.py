"""Rows of tokens on their way to experts and back, each sent to a rank once: layout, copies and sums. The definition.

Shapes: T tokens here, E experts, R ranks, rank r holding experts [r * E / R, (r + 1) * E / R), H hidden size, N rows,
P (token, expert) pairs. A row is a token on its way to one rank, in the order of (rank, token); its pairs follow each
other, in the order of (rank, token, expert). Where they arrive, pairs are put in the order of (expert, row).

A row fans out to its copies and copies are summed back to their row: one is the other's gradient, so both are one
relation, a `Fanout`, read in two directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Fanout(NamedTuple):
    """Which row every copy is of, and which copies every row has."""

    source_P: Tensor
    """[P] int64, the row of each copy."""
    copies_P: Tensor
    """[P] int64, the copies of row 0, then those of row 1, and so on."""
    bounds_N: Tensor
    """[N + 1] int64, where the copies of each row begin in `copies_P`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SendPlan:
    """What a rank sends."""

    rows: Fanout
    """Tokens to rows."""
    places_P: Tensor
    """[P] int64, the place of each pair in the flattened [T, E] probabilities."""
    codes_P: Tensor
    """[P] int32, what the receiver must know of each pair: its expert there, times two, plus one if a row begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceivePlan:
    """What a rank does with the rows it received."""

    pairs: Fanout
    """Rows to pairs in the order of their experts."""
    order_P: Tensor
    """[P] int64, for each place in that order the pair as received."""


def count_sends(routing_map_TE: Tensor, *, num_ranks: int) -> Tensor:
    """What this rank will send.

    Args:
        routing_map_TE: [T, E] bool.
        num_ranks: R, a divisor of E.

    Returns:
        [R + E] int64: rows for each rank, then pairs for each expert.
    """
    rows_R = _rank_map(routing_map_TE, num_ranks).any(-1).sum(1)
    return torch.cat([rows_R, routing_map_TE.sum(0)])


def plan_send(routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int) -> SendPlan:
    """Lay out rows and pairs.

    Args:
        routing_map_TE: [T, E] bool.
        num_ranks: R, a divisor of E.
        num_rows: N, the sum of the first R of `count_sends`.
        num_pairs: P, the sum of the others.

    Returns:
        The plan. If there are fewer pairs than `num_pairs`, places and codes beyond them are 0; the compiled ops on a
        CPU refuse sizes that do not fit.
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
    """Put the pairs of received rows in the order of their experts.

    Args:
        codes_P: [P] int32, the senders' SendPlan.codes_P, one after the other.
        num_rows: N, rows received.
        num_experts: E / R, the experts here, which the compiled ops count by; here they are sorted.
    """
    row_P = (codes_P & 1).long().cumsum(0) - 1
    order_P = (codes_P >> 1).argsort(stable=True)
    return ReceivePlan(pairs=fan_out(row_P.index_select(0, order_P), num_sources=num_rows), order_P=order_P)


def fan_out(source_P: Tensor, *, num_sources: int) -> Fanout:
    """The relation in which copy p is of row `source_P[p]`, an integer in [0, num_sources)."""
    counts_N = torch.zeros(num_sources + 1, dtype=torch.int64, device=source_P.device)
    counts_N.index_add_(0, source_P + 1, torch.ones_like(source_P))
    return Fanout(source_P=source_P, copies_P=source_P.argsort(stable=True), bounds_N=counts_N.cumsum(0))


def copy_rows(rows_NH: Tensor, *, fanout: Fanout) -> Tensor:
    """[P, H]: every copy of every row."""
    return rows_NH[fanout.source_P]


def sum_rows(copies_PH: Tensor, *, fanout: Fanout) -> Tensor:
    """[N, H]: the sum of every row's copies in their order and in float32 or better, rounded once."""
    # a bag gathers and adds in the order given; of half precision it rounds every sum, so it gets none
    is_half = copies_PH.dtype.itemsize < 4
    wide_PH = copies_PH.float() if is_half else copies_PH.contiguous()
    sums_NH = embedding_bag(fanout.copies_P, wide_PH, fanout.bounds_N, mode="sum", include_last_offset=True)
    return sums_NH.to(copies_PH.dtype)


def _rank_map(routing_map_TE: Tensor, num_ranks: int) -> Tensor:
    """[R, T, E / R] bool."""
    num_tokens, num_experts = routing_map_TE.shape
    if num_experts % num_ranks:
        raise ValueError(
            f"experts must divide into ranks of equally many; got {num_experts} experts, {num_ranks} ranks"
        )
    return routing_map_TE.view(num_tokens, num_ranks, num_experts // num_ranks).transpose(0, 1)
