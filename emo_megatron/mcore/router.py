"""PoolRouter: Megatron's TopKRouter with the choice of experts limited to each document's pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from emo_megatron import balance, ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import NO_BOUNDARIES, PoolScope
from emo_megatron.ops.reference import SCORE_FRACTION_BITS


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
        self._step_counts: balance.TokenCounts | None = None

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
        backend = self.backend(logits_TE)
        pool_DE = self._pool(logits_TE, ids_T, backend)
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
        probs_TE = routed.probs_TE
        if self.training:
            probs_TE = self._with_losses(probs_TE, routed, ids_T)
        self._apply_expert_bias(
            routed.routing_map_TE, padding_mask=None if ids_T is None else (ids_T < 0)[:, None]
        )
        return probs_TE, routed.routing_map_TE

    def reset_global_aux_loss_tracker(self) -> None:
        """Start a new step; Megatron calls it when gradients are final."""
        super().reset_global_aux_loss_tracker()
        self._step_counts = None

    def _document_ids(self, logits_TE: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        ids_T = None if self.scope is None else self.scope.document_ids_T
        if padding_mask is None:
            return ids_T
        if ids_T is None:
            ids_T = torch.zeros(logits_TE.shape[0], dtype=torch.int64, device=logits_TE.device)
        return ids_T.masked_fill(padding_mask.reshape(-1), -1)

    def backend(self, logits_TE: Tensor) -> ops.Backend:
        """Which routing ops run. Without pools this is the stock router to the last bit, which compiled ops are not."""
        if not self.pool.is_on:
            return "reference"
        return choose_backend(
            logits_TE.device.type,
            num_experts=logits_TE.shape[1],
            top_k=self.topk,
            dtype=logits_TE.dtype,
        )

    def _pool(self, logits_TE: Tensor, ids_T: Tensor | None, backend: ops.Backend) -> Tensor | None:
        """[D, E] bool, this layer's pools of the micro-batch, chosen once and kept for recompute; None: all."""
        if not self.pool.is_on or (not self.training and self.pool.pool_eval is None):
            return None
        scope = self.scope
        if scope is None or ids_T is None:
            raise ValueError(NO_BOUNDARIES)
        if self.layer_number not in scope.pools:
            scores_DE = ops.document_scores(
                logits_TE,
                document_ids_T=ids_T,
                num_documents=scope.segments.num_documents,
                backend=backend,
            )
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(scores_DE, group=self.tp_cp_group)
            sizes_D = self._pool_sizes(scores_DE, scope)
            pool_DE = ops.select_pool(
                scores_DE,
                pool_sizes_D=sizes_D,
                num_forced=self.pool.pool_forced,
                backend=backend,
            )
            scope.pools[self.layer_number] = pool_DE
            if self.training:
                self._record_documents(scores_DE, pool_DE)
        return scope.pools[self.layer_number]

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
        if scope.sizes_LD is None:
            layers_L = torch.arange(1, self.config.num_layers + 1, device=scores_DE.device)
            scope.sizes_LD = ops.draw_pool_sizes(
                scope.sample_positions_D,
                offsets_D=scope.segments.offsets_D,
                layer_number=layers_L[:, None],
                seed=self.pool.pool_seed,
                low=low,
                high=high,
                unrestricted_share=self.pool.pool_unrestricted,
                num_experts=num_experts,
            )
        return scope.sizes_LD[self.layer_number - 1]

    def _with_losses(self, probs_TE: Tensor, routed: ops.Routing, ids_T: Tensor | None) -> Tensor:
        """Attach this rank's share of the balance and z losses to the gradient of `probs_TE`."""
        lb_coeff = self.get_aux_loss_coeff("global_aux_loss")
        z_coeff = self.config.moe_z_loss_coeff or 0.0
        if lb_coeff == 0.0 and z_coeff == 0.0:
            return probs_TE
        fraction, population = self._counts(routed, ids_T)
        if not torch.is_grad_enabled():
            return probs_TE
        # Megatron averages gradients over data-parallel ranks, or divides their sum by all tokens of the step
        scale = (
            population.num_tokens
            if self.calculate_per_token_loss
            else self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        )
        if lb_coeff > 0.0:
            loss = balance.load_balancing_loss(
                routed.score_sums_E, fraction=fraction, population=population, top_k=self.topk
            )
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss * (lb_coeff * scale))
            self._record_share("global_load_balancing_loss", loss)
        if z_coeff > 0.0:
            loss = balance.z_loss(routed.z_T, population=population)
            probs_TE = MoEAuxLossAutoScaler.apply(probs_TE, loss * (z_coeff * scale))
            self._record_share("z_loss", loss)
        self._record_tokens(routed, population)
        return probs_TE

    def _counts(
        self, routed: ops.Routing, ids_T: Tensor | None
    ) -> tuple[balance.TokenCounts, balance.TokenCounts]:
        """Counts behind the balance fraction and of this micro-batch, reduced once and kept for recompute."""
        scope = self.scope
        if scope is not None and self.layer_number in scope.counts:
            return scope.counts[self.layer_number]
        num_tokens = (
            torch.full((), routed.z_T.shape[0], dtype=torch.int64, device=routed.z_T.device)
            if ids_T is None
            else (ids_T >= 0).sum()
        )
        population = balance.reduce_counts(
            routed.tokens_per_expert_E, num_tokens=num_tokens, group=self.tp_dp_cp_group
        )
        fraction = population
        if self.pool.pool_balance == "running":
            if self._step_counts is not None:
                fraction = population.plus(self._step_counts)
            self._step_counts = fraction
        if scope is not None:
            scope.counts[self.layer_number] = (fraction, population)
        return fraction, population

    def _record_share(self, name: str, share: Tensor) -> None:
        """Log a value of which every rank holds a share: summed when Megatron reports, not here."""
        get_moe_metrics_tracker().record(
            name,
            share,
            self.layer_number,
            self.config.num_layers,
            reduce_group=self.tp_dp_cp_group,
            needs_dp_avg=False,
        )

    def _record_mean(self, name: str, value: Tensor) -> None:
        get_moe_metrics_tracker().record(
            name,
            value,
            self.layer_number,
            self.config.num_layers,
            avg_group=self.tp_dp_cp_group,
            needs_dp_avg=False,
        )

    def _record_documents(self, scores_DE: Tensor, pool_DE: Tensor) -> None:
        is_real_D = scores_DE.sum(dim=-1) > 0
        num_real = is_real_D.sum().clamp(min=1)
        self._record_mean("pool_size", (pool_DE.sum(dim=-1) * is_real_D).sum() / num_real)
        mass_DE = scores_DE.double() / scores_DE.sum(dim=-1, keepdim=True).clamp(min=1)
        entropy_D = -torch.xlogy(mass_DE, mass_DE).sum(dim=-1)
        self._record_mean("document_entropy", (entropy_D.sum() / num_real).float())

    def _record_tokens(self, routed: ops.Routing, population: balance.TokenCounts) -> None:
        num_tokens = population.num_tokens.clamp(min=1)
        entropy_sum = routed.entropy_sum * 2.0**-SCORE_FRACTION_BITS
        self._record_share("token_entropy", entropy_sum / num_tokens)
        self._record_mean("load_imbalance", balance.load_imbalance(population))
        if self.scope is not None:
            self._record_mean(
                "experts_per_document",
                ops.experts_per_document(
                    routed.routing_map_TE,
                    document_ids_T=self.scope.document_ids_T,
                    num_documents=self.scope.segments.num_documents,
                ),
            )


@cache
def choose_backend(
    device_type: str, *, num_experts: int, top_k: int, dtype: torch.dtype
) -> ops.Backend:
    """The best backend for such logits. Rank 0 says once why it is not the compiled one."""
    reason = ops.why_not_native(device_type, num_experts=num_experts, top_k=top_k, dtype=dtype)
    if not reason:
        return "native"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"emo_megatron: routing runs in plain PyTorch, which is slower: {reason}", flush=True)
    return "reference"
