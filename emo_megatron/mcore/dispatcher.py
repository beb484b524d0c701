"""Token dispatchers: an all-to-all that sends a token at most once per rank, and flex dispatchers by the routing map.

Megatron's `alltoall` sends the hidden state of a token once per chosen expert, and receives one row per chosen expert.
Tokens of a pool share experts and therefore ranks. The dispatcher here sends one row per rank that holds any of the
token's experts, with the indices and probabilities of these experts (8 bytes per expert). One weighted sum per row
returns.

Shapes: s sequence length, b micro-batch size, T = s * b tokens on this rank, H hidden size, E experts, e experts on
this rank, N rows (a row is one token on the way to one rank), P (token, expert) pairs. N and P count what is sent or
what is received. X is any size.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, pad_routing_map
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from emo_megatron.ops.dispatch import ReceivePlan, SendPlan, copy_rows, count_sends, plan_receive, plan_send, sum_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Exchange:
    """Sizes of one dispatch, on the host. "Partners" are the expert-tensor-parallel ranks."""

    rows_to: list[int]
    rows_from: list[int]
    pairs_to: list[int]
    pairs_from: list[int]
    rows_of_partners: list[int]
    pairs_of_partners: list[int]
    tokens_per_expert: Tensor
    """[e] int64 on the CPU: number of pairs of all senders, per expert of this rank."""


class PoolAlltoAllDispatcher(MoETokenDispatcher):
    """Sends each token once to every rank that holds any of the token's experts. No token is dropped.

    MoELayer calls the six steps of Megatron's protocol in this order. The last three may be called again before the
    next dispatch, as hooks on expert outputs do. Outputs and gradients equal those of MoEAlltoAllTokenDispatcher up to
    the order of sums. In bf16 the expert outputs of a rank are summed in float32, and the sum is rounded once before it
    is sent; Megatron rounds every expert output.
    """

    # state of the last dispatch
    _shape: torch.Size
    _exchange: _Exchange
    _send: SendPlan
    _receive: ReceivePlan

    def __init__(self, num_local_experts: int, *, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Lay out the rows to send, and send the sizes and the experts of the rows to the receivers.

        Args:
            hidden_states: [s, b, H].
            routing_map: [s * b, E] bool.
            probs: [s * b, E].

        Returns:
            rows [N, H] and the probabilities [P] of the rows' pairs, in the order of their destinations.
        """
        if self.config.moe_router_padding_for_quantization:
            # add pairs of probability 0, until the tokens of every expert are a multiple that the expert kernels
            # require; an added pair costs no row if the pair's token is sent to that rank anyway
            multiple = get_align_size_for_quantization(self.config)
            routing_map = pad_routing_map(routing_map, multiple)
        self._shape = hidden_states.shape
        self._exchange = exchange = self._exchange_of(routing_map)
        self._send = send = plan_send(
            routing_map, num_ranks=self.ep_size, num_rows=sum(exchange.rows_to), num_pairs=sum(exchange.pairs_to)
        )
        codes_P = all_to_all(self.ep_group, send.codes_P, exchange.pairs_from, exchange.pairs_to)
        codes_P = self._gather_partners(codes_P, exchange.pairs_of_partners)
        self._receive = plan_receive(
            codes_P, num_rows=sum(exchange.rows_of_partners), num_experts=self.num_local_experts
        )
        rows_NH = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not self._rows_are_tokens:
            rows_NH = copy_rows(rows_NH, fanout=send.rows)
        return rows_NH, probs.flatten().gather(0, send.places_P)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange rows [N, H] and the probabilities [P] of the rows' pairs between the expert-parallel ranks."""
        exchange = self._exchange
        rows_NH = all_to_all(self.ep_group, hidden_states, exchange.rows_from, exchange.rows_to)
        probs_P = all_to_all(self.ep_group, probs, exchange.pairs_from, exchange.pairs_to)
        return rows_NH, probs_P

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copy each received row to each of the row's experts.

        Returns:
            tokens [P, H] sorted by expert, the number of tokens per expert [e] on the CPU, and the probabilities [P].
        """
        exchange, receive = self._exchange, self._receive
        rows_NH = self._gather_partners(hidden_states, exchange.rows_of_partners)
        probs_P = self._gather_partners(probs, exchange.pairs_of_partners)
        tokens_PH = copy_rows(rows_NH, fanout=receive.pairs)
        return tokens_PH, exchange.tokens_per_expert, probs_P.gather(0, receive.order_P)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the weighted outputs [P, H] of this rank's experts per row: [N, H]."""
        rows_NH = sum_rows(hidden_states, fanout=self._receive.pairs)
        if self.tp_size > 1:
            rows_NH = reduce_scatter_to_sequence_parallel_region(
                rows_NH, group=self.tp_group, input_split_sizes=self._exchange.rows_of_partners
            )
        return rows_NH

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Send rows [N, H] back to the ranks that sent them."""
        return all_to_all(self.ep_group, hidden_states, self._exchange.rows_to, self._exchange.rows_from)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Sum the rows of each token: [s, b, H]."""
        if not self._rows_are_tokens:
            hidden_states = sum_rows(hidden_states, fanout=self._send.rows)
        return hidden_states.view(self._shape)

    @property
    def _rows_are_tokens(self) -> bool:
        """Whether each token is one row (a single rank): nothing is sent, and only Megatron's permutation remains."""
        return self._exchange.rows_to == [self._shape[:-1].numel()]

    def _gather_partners(self, tensor_X: Tensor, sizes: list[int]) -> Tensor:
        """Gather a tensor from all expert-tensor-parallel ranks, which hold shards of the same experts."""
        if self.tp_size == 1:
            return tensor_X
        return gather_from_sequence_parallel_region(tensor_X, group=self.tp_group, output_split_sizes=sizes)

    def _exchange_of(self, routing_map_TE: Tensor) -> _Exchange:
        """Exchange the sizes of this dispatch. The only wait for the device: collectives need sizes on the host."""
        counts_X = count_sends(routing_map_TE, num_ranks=self.ep_size)
        # ranks of the group in the order (expert-parallel, expert-tensor-parallel)
        counts = (
            gather_from_sequence_parallel_region(counts_X, group=self.tp_ep_group)
            .cpu()
            .view(self.ep_size, self.tp_size, -1)
        )
        rows = counts[:, :, : self.ep_size]
        per_expert = counts[:, :, self.ep_size :].unflatten(-1, (self.ep_size, -1))
        pairs = per_expert.sum(-1)
        return _Exchange(
            rows_to=rows[self.ep_rank, self.tp_rank].tolist(),
            rows_from=rows[:, self.tp_rank, self.ep_rank].tolist(),
            pairs_to=pairs[self.ep_rank, self.tp_rank].tolist(),
            pairs_from=pairs[:, self.tp_rank, self.ep_rank].tolist(),
            rows_of_partners=rows[:, :, self.ep_rank].sum(0).tolist(),
            pairs_of_partners=pairs[:, :, self.ep_rank].sum(0).tolist(),
            tokens_per_expert=per_expert[:, :, self.ep_rank].sum((0, 1)),
        )


def leaves_padding_out(config: Any) -> bool:
    """Whether the dispatcher accepts tokens without experts, as DeepEP and HybridEP do.

    All-to-all requires K experts per token, and the documentation of NCCL EP does not say whether fewer are allowed.
    With both, the logits of each padding token choose the experts of that token, which spreads padding over experts.
    """
    return config.moe_token_dispatcher_type == "flex" and config.moe_flex_dispatcher_backend in ("deepep", "hybridep")


def follow_routing_map(dispatcher: Any, config: Any) -> None:
    """Make a flex dispatcher's manager use the routing map. Other dispatchers use the routing map already.

    The managers of DeepEP and NCCL EP ignore the map and send each token to the experts with the token's largest
    weights. Padding has no weights, so all padding would go to the same experts. An expert whose weight underflowed to
    0 would be replaced by another expert, possibly outside the pool.
    """
    if config.moe_token_dispatcher_type != "flex" or config.moe_flex_dispatcher_backend == "hybridep":
        # HybridEP's manager uses the map
        return
    manager = dispatcher._comm_manager
    # a bound method, not a closure over the manager, because a copy of the layer has its own manager
    manager.setup_metadata = types.MethodType(_setup_metadata, manager)


def _setup_metadata(manager: Any, routing_map: Tensor, probs: Tensor) -> None:
    type(manager).setup_metadata(manager, routing_map, probs)
    map_TE, probs_TE = (x.reshape(len(x), -1) for x in (routing_map, probs))
    # the order of a token's experts does not matter, so neither does the order of equal keys
    is_sent_TK, experts_TK = torch.topk(map_TE.to(probs_TE.dtype), manager.router_topk, dim=-1)
    # -1 marks an unused slot
    manager.token_indices = experts_TK.masked_fill(is_sent_TK == 0, -1)
    manager.token_probs = probs_TE.gather(1, experts_TK)
