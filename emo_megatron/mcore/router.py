"""PoolRouter: Megatron's TopKRouter with the choice of experts limited to each document's pool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from emo_megatron import balance, ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK, NO_BOUNDARIES, PoolScope
from emo_megatron.mcore.flex import leaves_padding_out
from emo_megatron.mcore.metrics import Groups, pool_metrics
from emo_megatron.mcore.reruns import Runs, begin_run


class PoolRouter(TopKRouter):
    """Routes every token inside the pool its document chose in this layer.

    Overrides `routing` and never `forward`, which ModelOpt and Bridge's adapters rely on, and adds no parameters:
    a checkpoint is the stock router's. With pools off it is the standard router with the same balance loss.

    Attributes:
        scope: the micro-batch being routed; PoolMoELayer sets it around every call.
        allowed_experts: [E] bool or None. Restricts routing to a subset, as a deployed module would route.
        observe_logits: called with the float32 logits [T, E] and document ids [T] (-1 padding) of every forward.
    """

    scope: PoolScope | None = None
    allowed_experts: Tensor | None = None
    observe_logits: Callable[[Tensor, Tensor | None], None] | None = None

    def __init__(self, *args: Any, pool: PoolConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool
        self._step_counts_X: Tensor | None = None
        self.runs = Runs()

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [s, b, E].
            padding_mask: [s, b] bool, True = padding; None: only what the document boundaries leave out.

        Returns:
            probs [s * b, E] in the dtype of the logits and routing_map [s * b, E] bool.
        """
        logits_TE = logits.reshape(-1, self.config.num_moe_experts)
        ids_T = self._document_ids(logits_TE, padding_mask)
        if self.observe_logits is not None:
            self.observe_logits(logits_TE.detach().float(), ids_T)
        if self.allowed_experts is not None:
            logits_TE = logits_TE.masked_fill(~self.allowed_experts, float("-inf"))
        # a loop that does not tell which step it is in would seem to run one step for ever
        if self.training and self.scope is not None and CLOCK.is_told:
            begin_run(self, self.scope.consumed_samples)
        backend = self._backend_of_scope(logits_TE)
        pool_DE, scores_DE = self._pool(logits_TE, ids_T, backend)
        if self.allowed_experts is not None:
            # -inf alone would not keep them out: a bias, or an underflow to equal zeros, can pick them
            allowed_1E = self.allowed_experts[None]
            pool_DE = allowed_1E if pool_DE is None else pool_DE & allowed_1E
        routed = ops.pool_topk(
            logits_TE,
            document_ids_T=ids_T,
            pool_DE=pool_DE,
            top_k=self.topk,
            score_function=self.score_function,
            pre_softmax=self.config.moe_router_pre_softmax,
            expert_bias_E=self.expert_bias,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            mask=self.pool.pool_mask,
            backend=backend,
        )
        if self._is_fused and pool_DE is None:
            routed = self._with_fused_choice(routed, logits_TE, ids_T)
        probs_TE = routed.probs_TE
        if self.training:
            probs_TE = self._with_losses(probs_TE, routed, ids_T, scores_DE)
        self._count_for_bias(routed)
        return probs_TE, self._dispatched_map(routed.routing_map_TE, ids_T)

    def reset_global_aux_loss_tracker(self) -> None:
        """Start a new step; Megatron calls it when gradients are final."""
        super().reset_global_aux_loss_tracker()
        self._step_counts_X = None

    def _document_ids(self, logits_TE: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        ids_T = None if self.scope is None else self.scope.document_ids_T
        if padding_mask is None:
            return ids_T
        if ids_T is None:
            ids_T = torch.zeros(logits_TE.shape[0], dtype=torch.int64, device=logits_TE.device)
        return ids_T.masked_fill(padding_mask.reshape(-1), -1)

    def backend(self, logits_TE: Tensor) -> ops.Backend:
        """Which routing ops run. Without pools this is the stock router to the last bit, which compiled ops are not."""
        if self._is_standard and not self._is_fused:
            return "reference"
        return choose_backend(
            logits_TE.device.type,
            num_experts=logits_TE.shape[1],
            top_k=self.topk,
            dtype=logits_TE.dtype,
        )

    @property
    def _is_fused(self) -> bool:
        """Whether Transformer Engine chooses, as in the stock router; with pools the compiled ops are fused already."""
        return bool(self.config.moe_router_fusion) and self._is_standard

    @property
    def _is_standard(self) -> bool:
        """Whether this micro-batch is the standard MoE's: pools are off, or training has not reached their start."""
        if self.scope is None or not self.training:
            return not self.pool.is_on
        return not self.pool.is_on_after(self.scope.consumed_samples)

    def _with_fused_choice(
        self, routed: ops.Routing, logits_TE: Tensor, ids_T: Tensor | None
    ) -> ops.Routing:
        """The stock router's choice with --moe-router-fusion, to the last bit, and its counts; the losses stay.

        Raises:
            ValueError: Megatron's own, without Transformer Engine.
        """
        probs_TE, map_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=True,
        )
        counted_TE = map_TE
        if ids_T is not None:
            is_text_T1 = (ids_T >= 0)[:, None]
            probs_TE, counted_TE = probs_TE * is_text_T1, map_TE & is_text_T1
        # on ties it may choose others than the op did
        counts_X = torch.cat([counted_TE.sum(dim=0), routed.counts_X[map_TE.shape[1] :]])
        return dataclasses.replace(
            routed, probs_TE=probs_TE, routing_map_TE=map_TE, counts_X=counts_X
        )

    def _backend_of_scope(self, logits_TE: Tensor) -> ops.Backend:
        """The backend of this micro-batch: recompute takes that of the first pass, whose bits it must repeat."""
        scope = self.scope
        if scope is None:
            return self.backend(logits_TE)
        if self.layer_number not in scope.backends:
            scope.backends[self.layer_number] = self.backend(logits_TE)
        return scope.backends[self.layer_number]

    def _pool(
        self, logits_TE: Tensor, ids_T: Tensor | None, backend: ops.Backend
    ) -> tuple[Tensor | None, Tensor | None]:
        """This layer's pools of the micro-batch, [D, E] bool, chosen once and kept for recompute; None: all experts.

        Beside them, where they were chosen just now, the scores they were chosen by, [D, E] int64.
        """
        if not self.pool.is_on or (not self.training and self.pool.pool_eval is None):
            return None, None
        scope = self.scope
        if scope is None or ids_T is None:
            raise ValueError(NO_BOUNDARIES)
        if self._is_standard or self.layer_number in scope.pools:
            return scope.pools.get(self.layer_number), None
        scores_DE = ops.document_scores(
            logits_TE,
            document_ids_T=ids_T,
            num_documents=scope.segments.num_documents,
            backend=backend,
        )
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(scores_DE, group=self.tp_cp_group)
        pool_DE = ops.select_pool(
            scores_DE,
            pool_sizes_D=self._pool_sizes(scores_DE, scope),
            num_forced=self.pool.pool_forced,
            backend=backend,
        )
        scope.pools[self.layer_number] = pool_DE
        return pool_DE, scores_DE

    def _pool_sizes(self, scores_DE: Tensor, scope: PoolScope) -> Tensor:
        num_experts = scores_DE.shape[1]
        if not self.training and self.pool.pool_eval is not None:
            return torch.full_like(scope.sample_positions_D, self.pool.pool_eval)
        low, high = self.pool.size_bounds(
            num_experts=num_experts, consumed_samples=scope.consumed_samples
        )
        if self.pool.pool_rule == "top_p":
            assert self.pool.pool_top_p is not None
            return ops.top_p_pool_sizes(scores_DE, top_p=self.pool.pool_top_p, low=low, high=high)
        bounds = {"low": low, "high": high, "num_experts": num_experts}
        sizes_LD = scope.draw_sizes(self.pool, num_layers=self.config.num_layers, **bounds)
        return sizes_LD[self.layer_number - 1]

    def _with_losses(
        self,
        probs_TE: Tensor,
        routed: ops.Routing,
        ids_T: Tensor | None,
        scores_DE: Tensor | None,
    ) -> Tensor:
        """Record what is counted, and attach this rank's share of the balance and z losses to `probs_TE`'s gradient."""
        lb_coeff = self.get_aux_loss_coeff("global_aux_loss")
        z_coeff = self.config.moe_z_loss_coeff or 0.0
        has_losses = lb_coeff > 0.0 or z_coeff > 0.0
        # what a layer counts of a micro-batch is counted once, in the first of the passes that recompute repeats
        scope = self.scope
        is_first = (
            torch.is_grad_enabled() if scope is None else self.layer_number not in scope.counts
        )
        fraction, population = self._counts(routed, is_reduced=has_losses, is_first=is_first)
        if is_first:
            self._record(routed.routing_map_TE, ids_T, scores_DE)
        if not has_losses or not torch.is_grad_enabled():
            return probs_TE
        # Megatron averages gradients over data-parallel ranks, or divides their sum by all tokens of the step
        num_ranks = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        scale = 1 if self.calculate_per_token_loss else num_ranks
        weighted = []
        if lb_coeff > 0.0:
            loss = balance.load_balancing_loss(
                routed.score_sums_E, fraction=fraction, population=population, top_k=self.topk
            )
            weighted.append((loss, lb_coeff * scale))
            self._record_share("global_load_balancing_loss", loss)
        if z_coeff > 0.0:
            loss = balance.z_loss(routed.z_T, population=population)
            weighted.append((loss, z_coeff * scale))
            self._record_share("z_loss", loss)
        attached = balance.weighted_sum(weighted)
        if self.calculate_per_token_loss:
            attached = attached * population.num_tokens
        return MoEAuxLossAutoScaler.apply(probs_TE, attached)

    def _counts(
        self, routed: ops.Routing, *, is_reduced: bool, is_first: bool
    ) -> tuple[balance.TokenCounts, balance.TokenCounts]:
        """Counts behind the balance fraction and of this micro-batch, reduced once and kept for recompute."""
        scope = self.scope
        if scope is not None and not is_first:
            return scope.counts[self.layer_number]
        counts_X = routed.counts_X
        if is_reduced:
            counts_X = balance.reduce_counts(counts_X, group=self.tp_dp_cp_group)
        num_experts = routed.routing_map_TE.shape[1]
        population = fraction = balance.TokenCounts.of(counts_X, num_experts=num_experts)
        if self.pool.pool_balance == "running":
            so_far_X = counts_X if self._step_counts_X is None else counts_X + self._step_counts_X
            fraction = balance.TokenCounts.of(so_far_X, num_experts=num_experts)
            if is_first:
                self._step_counts_X = so_far_X
        if is_first and scope is not None:
            scope.counts[self.layer_number] = (fraction, population)
        if is_first and (tracker := pool_metrics()) is not None:
            tracker.add_counts(
                self.layer_number, counts_X, groups=self._groups, is_reduced=is_reduced
            )
        return fraction, population

    def _record(
        self, routing_map_TE: Tensor, ids_T: Tensor | None, scores_DE: Tensor | None
    ) -> None:
        """Hand what the metrics need of this micro-batch's documents to the tracker: sums, no ratios."""
        tracker, scope = pool_metrics(), self.scope
        if tracker is None or scope is None or ids_T is None:
            return
        used_DW = ops.experts_used(
            routing_map_TE,
            document_ids_T=ids_T,
            num_documents=scope.segments.num_documents,
        )
        is_split = self.tp_cp_group.size() > 1
        if is_split:
            tracker.hold_used(self.layer_number, used_DW, groups=self._groups)
        if scores_DE is not None or not is_split:
            statistics_S = ops.document_statistics(
                scores_DE,
                pool_DE=None if scores_DE is None else scope.pools[self.layer_number],
                used_DW=None if is_split else used_DW,
            )
            tracker.add_documents(self.layer_number, statistics_S, groups=self._groups)

    def _record_share(self, name: str, share: Tensor) -> None:
        """Log a value of which every rank holds a share: summed when Megatron reports, not here."""
        get_moe_metrics_tracker().record(
            name,
            share,
            self.layer_number,
            # as long as the record of Megatron's own router in its multi-token-prediction layers
            self.config.num_layers + (self.config.mtp_num_layers or 0),
            reduce_group=self.tp_dp_cp_group,
            needs_dp_avg=False,
        )

    @property
    def _groups(self) -> Groups:
        return Groups(tp_cp=self.tp_cp_group, tp_dp_cp=self.tp_dp_cp_group)

    def _count_for_bias(self, routed: ops.Routing) -> None:
        """What Megatron's `_apply_expert_bias` does, whose mask has another form in each of its versions."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += routed.tokens_per_expert_E

    def _dispatched_map(self, routing_map_TE: Tensor, ids_T: Tensor | None) -> Tensor:
        """The map without padding for dispatchers that take any number of experts a token; see mcore/flex.py."""
        if ids_T is None or not leaves_padding_out(self.config):
            # Megatron's dispatchers write padding for quantisation into the map, which backward reads
            pads = self.config.moe_router_padding_for_quantization
            return routing_map_TE.clone() if pads else routing_map_TE
        return routing_map_TE & (ids_T >= 0)[:, None]


def choose_backend(
    device_type: str, *, num_experts: int, top_k: int, dtype: torch.dtype
) -> ops.Backend:
    """The best backend for such logits. Rank 0 says, once a reason, why it is not the compiled one.

    Raises:
        RuntimeError: EMO_OPS=native asks for the compiled ops, and they cannot run.
    """
    backend = ops.best_backend(device_type, num_experts, top_k, dtype)
    if backend == "reference":
        _tell(ops.why_not_native(device_type, num_experts=num_experts, top_k=top_k, dtype=dtype))
    return backend


@functools.cache
def _tell(reason: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"emo_megatron: routing runs in plain PyTorch, which is slower: {reason}", flush=True)
