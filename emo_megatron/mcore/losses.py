"""A router's load-balancing losses and z-loss: the token counts, the ranks they cover, and the gradient.

Three load-balancing losses, named by Megatron's flag, can be used alone or together. `global_aux_loss` covers the
micro-batch of all ranks, `aux_loss` the micro-batch of one data-parallel rank, and `seq_aux_loss` each document inside
its pool. All three count the K highest scores of each token, as Megatron does: the expert bias and the groups do not
matter (DeepSeek-V3, arXiv 2412.19437, equation 18). A layer's counts of a micro-batch are computed once and stored in
the micro-batch's scope, so that recompute repeats no collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from emo_megatron import balance, ops
from emo_megatron.balance import LayerCounts, TokenCounts
from emo_megatron.mcore.metrics import num_rows, pool_metrics

if TYPE_CHECKING:
    from emo_megatron.mcore.context import PoolScope
    from emo_megatron.mcore.router import PoolRouter


KINDS = ("global_aux_loss", "aux_loss", "seq_aux_loss")


class RouterLosses:
    """The losses of one router; the router calls `attach` for every micro-batch of training.

    Args:
        router: source of the configuration, the process groups and the micro-batch's scope, read at every call.
    """

    def __init__(self, router: PoolRouter) -> None:
        self.router = router
        self._step_counts: dict[int, Tensor] = {}

    def begin_step(self) -> None:
        """Reset the counts of pool_balance=running."""
        self._step_counts.clear()

    def coefficient(self, kind: str) -> float:
        """The coefficient of a load-balancing loss; 0 if the loss is off.

        If a layer predicts at several depths, the coefficient is divided by the number of depths, so that the mean
        over depths counts. Megatron does this for load-balancing losses, but not for the z-loss.
        """
        return float(self.router.get_aux_loss_coeff(kind)) / self.router.num_depths

    @property
    def _z_coeff(self) -> float:
        return self.router.config.moe_z_loss_coeff or 0.0

    @property
    def needs_documents(self) -> bool:
        """Whether the losses need scores and choices summed per document."""
        return self.router.training and self.coefficient("seq_aux_loss") > 0.0

    def attach(
        self,
        probs_TE: Tensor,
        routed: ops.Routing,
        *,
        ids_T: Tensor | None,
        pool_DE: Tensor | None,
        scores_DE: Tensor | None,
        choose_plainly: Callable[[], ops.Routing] | None,
    ) -> Tensor:
        """Count the micro-batch, and attach this rank's shares of the losses to the gradient of `probs_TE`.

        Args:
            probs_TE: weights of the chosen experts; the values are returned unchanged.
            ids_T: document of each token; None: no document boundaries.
            pool_DE: the documents' pools; None: all experts.
            scores_DE: the scores that chose the pools; None: the pools were not chosen in this pass.
            choose_plainly: routes again without expert bias and groups; None: the router has neither.
        """
        router, scope = self.router, self.router.scope
        if scope is None and not torch.is_grad_enabled():
            # recompute will run this again, and without a scope the counts could not be stored
            return probs_TE
        # count once per layer and micro-batch, in the first pass; recompute reads the stored counts
        if scope is None or router.layer_number not in scope.counts:
            counts = self._count(routed, pool_DE, choose_plainly)
            if scope is not None:
                scope.counts[router.layer_number] = counts
                self._record_documents(scope, routed.routing_map_TE, ids_T, scores_DE)
        else:
            counts = scope.counts[router.layer_number]
        if not torch.is_grad_enabled():
            return probs_TE
        # Megatron averages gradients over data-parallel ranks, or divides their sum by all tokens of the step
        num_ranks = router.tp_dp_cp_group.size() // router.tp_cp_group.size()
        is_per_token = router.calculate_per_token_loss
        attached = []
        if shares := self._shares_of_all_ranks(routed, counts):
            scale = 1 if is_per_token else num_ranks
            share = balance.weighted_sum([(loss, weight * scale) for loss, weight in shares])
            attached.append(share * counts.population.num_tokens if is_per_token else share)
        if (own := counts.own) is not None:
            loss = balance.load_balancing_loss(routed.score_sums_E, fraction=own, population=own, top_k=router.topk)
            self._record_share("load_balancing_loss", loss, router.tp_cp_group, is_mean=True)
            share = loss * self.coefficient("aux_loss")
            attached.append(share * own.num_tokens if is_per_token else share)
        if not attached:
            return probs_TE
        return MoEAuxLossAutoScaler.apply(probs_TE, functools.reduce(torch.add, attached))

    def _shares_of_all_ranks(self, routed: ops.Routing, counts: LayerCounts) -> list[tuple[Tensor, float]]:
        """(this rank's share, coefficient) of each loss that covers all ranks."""
        everyone = self.router.tp_dp_cp_group
        weighted = []
        if (coefficient := self.coefficient("global_aux_loss")) > 0.0:
            loss = balance.load_balancing_loss(
                routed.score_sums_E, fraction=counts.fraction, population=counts.population, top_k=self.router.topk
            )
            weighted.append((loss, coefficient))
            self._record_share("global_load_balancing_loss", loss, everyone)
        if (coefficient := self.coefficient("seq_aux_loss")) > 0.0:
            assert counts.weights_DE is not None
            loss = balance.document_balance_loss(routed.score_sums_RE, weights_DE=counts.weights_DE)
            weighted.append((loss, coefficient))
            self._record_share("seq_load_balancing_loss", loss, everyone)
        if self._z_coeff > 0.0:
            loss = balance.z_loss(routed.z_T, population=counts.population)
            weighted.append((loss, self._z_coeff))
            self._record_share("z_loss", loss, everyone)
        return weighted

    def _count(
        self, routed: ops.Routing, pool_DE: Tensor | None, choose_plainly: Callable[[], ops.Routing] | None
    ) -> LayerCounts:
        """The counts that the losses need, reduced over the ranks."""
        router = self.router
        num_experts = routed.routing_map_TE.shape[1]
        num_real = routed.counts_X.shape[0]
        balanced, counts_X = routed, routed.counts_X
        if choose_plainly is not None and any(map(self.coefficient, KINDS)):
            with torch.no_grad():
                balanced = choose_plainly()
            # one collective for both: first the counts of the losses, last the counts of the metrics
            counts_X = torch.cat([balanced.counts_X[: num_experts + 1], counts_X])
        is_reduced = self.needs_documents or self.coefficient("global_aux_loss") > 0.0 or self._z_coeff > 0.0
        if is_reduced:
            counts_X = balance.reduce_counts(counts_X, group=router.tp_dp_cp_group)
        population = fraction = TokenCounts.of(counts_X, num_experts=num_experts)
        if router.pool.pool_balance == "running":
            before_X = self._step_counts.get(router.layer_number)
            so_far_X = counts_X if before_X is None else counts_X + before_X
            fraction = TokenCounts.of(so_far_X, num_experts=num_experts)
            self._step_counts[router.layer_number] = so_far_X
        weights_DE = choices_DE = None
        if self.needs_documents:
            choices_DE = balanced.document_choices_DE
            choices_DE = balance.reduce_counts(choices_DE, group=router.tp_cp_group)
            weights_DE = balance.document_weights(
                choices_DE, pool_sizes_D=None if pool_DE is None else pool_DE.sum(dim=-1), population=population
            )
        if (tracker := pool_metrics()) is not None:
            tracker.tp_cp_group, tracker.tp_dp_cp_group = router.tp_cp_group, router.tp_dp_cp_group
            tracker.add_counts(router.layer_number, counts_X[-num_real:], is_reduced=is_reduced)
        own = self._own_counts(balanced, choices_DE)
        return LayerCounts(fraction=fraction, population=population, own=own, weights_DE=weights_DE)

    def _own_counts(self, balanced: ops.Routing, choices_DE: Tensor | None) -> TokenCounts | None:
        """The counts of `aux_loss` over the ranks that share documents; None: `aux_loss` is off.

        Args:
            balanced: the routing whose choices the losses count.
            choices_DE: choices per document, already summed over these ranks; None: not computed.
        """
        if self.coefficient("aux_loss") <= 0.0:
            return None
        if choices_DE is not None:
            choices_E = choices_DE.sum(dim=0)
            num_tokens = choices_E.sum() // self.router.topk
            return TokenCounts(tokens_per_expert_E=choices_E, num_tokens=num_tokens)
        num_experts = balanced.routing_map_TE.shape[1]
        own_X = balanced.counts_X[: num_experts + 1]
        own_X = balance.reduce_counts(own_X, group=self.router.tp_cp_group)
        return TokenCounts.of(own_X, num_experts=num_experts)

    def _record_documents(
        self, scope: PoolScope, routing_map_TE: Tensor, ids_T: Tensor | None, scores_DE: Tensor | None
    ) -> None:
        """Give the tracker the sums over this micro-batch's documents that the metrics need."""
        tracker, number = pool_metrics(), self.router.layer_number
        if tracker is None or ids_T is None:
            return
        used_DW = ops.experts_used(routing_map_TE, document_ids_T=ids_T, num_documents=scope.segments.num_documents)
        pool_DE = None if scores_DE is None else scope.pools[number]
        tracker.add_documents(number, used_DW, pool_DE=pool_DE, scores_DE=scores_DE)

    def _record_share(self, name: str, share: Tensor, group: Any, *, is_mean: bool = False) -> None:
        """Log a loss of which every rank of `group` has a share.

        Megatron sums the shares when it reports; with `is_mean` it then averages the sums over data-parallel ranks.
        """
        router = self.router
        get_moe_metrics_tracker().record(
            name, share, router.layer_number, num_rows(router.config), reduce_group=group, needs_dp_avg=is_mean
        )
