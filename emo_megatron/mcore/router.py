"""PoolRouter: Megatron's TopKRouter with the choice of experts limited to each document's pool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from emo_megatron import ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK, PoolScope
from emo_megatron.mcore.dispatcher import leaves_padding_out
from emo_megatron.mcore.losses import RouterLosses
from emo_megatron.mcore.metrics import num_rows
from emo_megatron.mcore.reruns import Runs, begin_run


class PoolRouter(TopKRouter):
    """Routes every token inside the pool that the token's document chose in this layer.

    Overrides `routing` but not `forward`, because ModelOpt and Bridge's adapters depend on `forward`. Adds no
    parameters, so checkpoints are those of Megatron's router. With pools off, this is the standard router with the
    same load-balancing loss.

    Attributes:
        scope: scope of the current micro-batch; PoolMoELayer sets the scope for every call.
        allowed_experts: [E] bool or None. Restricts routing to these experts, as in a deployed module.
        observe_logits: called in every forward with the float32 logits [T, E] and document ids [T] (-1 padding).
        mtp_depth: how many tokens further ahead than the decoder this layer predicts; 0 in the decoder.
    """

    scope: PoolScope | None = None
    allowed_experts: Tensor | None = None
    observe_logits: Callable[[Tensor, Tensor | None], None] | None = None
    mtp_depth: int = 0

    def __init__(self, *args: Any, pool: PoolConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pool = pool
        self.losses = RouterLosses(self)
        self.runs = Runs()

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's method, but numbers of multi-token-prediction layers continue after those of the decoder.

        Megatron numbers these layers from 1 again. The scope stores its values by layer number, so numbers must differ.
        """
        self.mtp_depth = layer_number if self.is_mtp_layer else 0
        super().set_layer_number(layer_number + self.config.num_layers * self.is_mtp_layer)

    @property
    def num_depths(self) -> int:
        """Number of depths that this layer predicts; `layer_number` changes from depth to depth."""
        is_repeated = self.is_mtp_layer and self.config.mtp_use_repeated_layer
        return int(self.config.mtp_num_layers) if is_repeated else 1

    @property
    def layer_numbers(self) -> range:
        """All values of `layer_number` in one forward pass."""
        first = self.layer_number if self.num_depths == 1 else self.config.num_layers + 1
        return range(first, first + self.num_depths)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [s, b, E].
            padding_mask: [s, b] bool, True = padding; None: padding is only what lies outside of all documents.

        Returns:
            probs [s * b, E] in the dtype of the logits and routing_map [s * b, E] bool.
        """
        logits_TE = logits.reshape(-1, self.config.num_moe_experts)
        ids_T = self._document_ids(logits_TE, padding_mask)
        if self.observe_logits is not None:
            self.observe_logits(logits_TE.detach().float(), ids_T)
        if self.allowed_experts is not None:
            logits_TE = logits_TE.masked_fill(~self.allowed_experts, float("-inf"))
        # only if the training loop sets the clock: without the clock all micro-batches would seem to be one step
        if self.training and self.scope is not None and CLOCK.is_set:
            begin_run(self, self.scope.consumed_samples)
        backend = self._backend_of_scope(logits_TE)
        pool_DE, scores_DE = self._pool(logits_TE, ids_T, backend)
        num_groups = self._groups_of_tokens(pool_DE)
        num_documents = None
        if self.losses.needs_documents:
            ids_T, num_documents = self._documents(ids_T, logits)
        pool_DE = self._of_allowed(pool_DE)
        choose = functools.partial(
            ops.pool_topk,
            document_ids_T=ids_T,
            pool_DE=pool_DE,
            top_k=self.topk,
            score_function=self.score_function,
            pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            mask=self.pool.pool_mask,
            num_documents=num_documents,
            backend=backend,
        )
        routed = choose(
            logits_TE,
            expert_bias_E=self.expert_bias,
            num_groups=num_groups,
            group_topk=self.config.moe_router_group_topk,
        )
        is_plain = self.expert_bias is None and num_groups is None
        if self._is_fused and pool_DE is None:
            routed = self._with_fused_choice(routed, logits_TE, ids_T)
        probs_TE = routed.probs_TE
        if self.training:
            probs_TE = self.losses.attach(
                probs_TE,
                routed,
                ids_T=ids_T,
                pool_DE=pool_DE,
                scores_DE=scores_DE,
                choose_plainly=None if is_plain else functools.partial(choose, logits_TE.detach()),
            )
        self._count_for_bias(routed)
        return probs_TE, self._dispatched_map(routed.routing_map_TE, ids_T)

    def reset_global_aux_loss_tracker(self) -> None:
        """Start a new step; Megatron calls this method when gradients are final."""
        super().reset_global_aux_loss_tracker()
        self.losses.begin_step()

    def _document_ids(self, logits_TE: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        ids_T = None if self.scope is None else self.scope.ids_at(self.mtp_depth)
        if padding_mask is None:
            return ids_T
        if ids_T is None:
            ids_T = torch.zeros(logits_TE.shape[0], dtype=torch.int64, device=logits_TE.device)
        return ids_T.masked_fill(padding_mask.reshape(-1), -1)

    def _documents(self, ids_T: Tensor | None, logits: Tensor) -> tuple[Tensor, int]:
        """Document of each token for seq_aux_loss, [T] int64, and the number of documents.

        Without document boundaries every sample is one document.
        """
        if self.scope is not None and ids_T is not None:
            return ids_T, self.scope.segments.num_documents
        num_rows = logits.shape[1]
        rows_T = torch.arange(num_rows, device=logits.device).repeat(logits.shape[0])
        return rows_T if ids_T is None else rows_T.masked_fill(ids_T < 0, -1), num_rows

    def _groups_of_tokens(self, pool_DE: Tensor | None) -> int | None:
        """Number of expert groups for the group limit per token; None: tokens of these pools need no limit."""
        if self.pool.pool_group_scope == "document" and pool_DE is not None:
            # the pool already holds only experts of the admitted groups
            return self.num_groups if self.pool.pool_unrestricted > 0.0 else None
        return self.num_groups

    def _of_allowed(self, pool_DE: Tensor | None) -> Tensor | None:
        """The pools without experts that are not allowed; logits of -inf alone do not exclude these experts."""
        if self.allowed_experts is None:
            return pool_DE
        # an expert bias, or scores that underflow to zero, could select an expert that is not allowed
        allowed_1E = self.allowed_experts[None]
        return allowed_1E if pool_DE is None else pool_DE & allowed_1E

    @property
    def num_groups(self) -> int | None:
        """Number of expert groups, of which a token may use moe_router_group_topk; None: there is no limit.

        With `allowed_experts` there is no limit, because a module made of a subset of the experts has no groups.
        """
        limit, groups = self.config.moe_router_group_topk, self.config.moe_router_num_groups
        if not limit or not groups or limit >= groups or self.allowed_experts is not None:
            return None
        return int(groups)

    @property
    def most_in_pool(self) -> int:
        """Largest number of experts in a pool, except for unrestricted documents."""
        most = int(self.config.num_moe_experts)
        if self.pool.pool_group_scope == "document" and self.num_groups is not None:
            most = most // self.num_groups * self.config.moe_router_group_topk
        return most

    def backend(self, logits_TE: Tensor) -> ops.Backend:
        """The backend of the routing ops: compiled or reference.

        Without pools and --moe-router-fusion the backend is "reference", which equals Megatron's router bit for bit;
        compiled ops do not. If compiled ops cannot run, rank 0 prints each reason once.
        """
        if self._is_standard and not self._is_fused:
            return "reference"
        device, num_experts, dtype = logits_TE.device.type, logits_TE.shape[1], logits_TE.dtype
        backend = ops.best_backend(device, num_experts, self.topk, dtype, self.num_groups or 0)
        if backend == "reference":
            limits: dict[str, Any] = {"num_experts": num_experts, "top_k": self.topk, "dtype": dtype}
            tell_backend(ops.why_not_native(device, **limits, num_groups=self.num_groups or 0))
        return backend

    @property
    def _is_fused(self) -> bool:
        """Whether Transformer Engine chooses the experts (--moe-router-fusion); never where pools are in effect."""
        return bool(self.config.moe_router_fusion) and self._is_standard

    @property
    def _is_standard(self) -> bool:
        """Whether this micro-batch is routed as in the standard MoE: pools are off, or have not started yet."""
        if self.scope is None or not self.training:
            return not self.pool.is_on
        return not self.pool.is_on_after(self.scope.consumed_samples)

    def _with_fused_choice(self, routed: ops.Routing, logits_TE: Tensor, ids_T: Tensor | None) -> ops.Routing:
        """`routed` with the choice and counts of Megatron's fused router, bit for bit; losses use `routed`'s scores."""
        probs_TE, map_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.num_groups,
            group_topk=self.config.moe_router_group_topk if self.num_groups else None,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=True,
        )
        counted_TE = map_TE
        if ids_T is not None:
            is_text_T1 = (ids_T >= 0)[:, None]
            probs_TE, counted_TE = probs_TE.masked_fill(~is_text_T1, 0.0), map_TE & is_text_T1
        # on ties the fused router may choose other experts than the routing op
        counts_X = torch.cat([counted_TE.sum(dim=0), routed.counts_X[map_TE.shape[1] :]])
        choices_DE = routed.document_choices_DE
        if ids_T is not None and len(choices_DE):
            choices_DE = torch.zeros_like(choices_DE).index_add_(0, ids_T.clamp(min=0), counted_TE.to(choices_DE.dtype))
        return dataclasses.replace(
            routed, probs_TE=probs_TE, routing_map_TE=map_TE, counts_X=counts_X, document_choices_DE=choices_DE
        )

    def _backend_of_scope(self, logits_TE: Tensor) -> ops.Backend:
        """The backend of this micro-batch; recompute uses the first pass's backend, to get the same bits."""
        scope = self.scope
        if scope is None:
            return self.backend(logits_TE)
        if self.layer_number not in scope.backends:
            scope.backends[self.layer_number] = self.backend(logits_TE)
        return scope.backends[self.layer_number]

    def _pool(
        self, logits_TE: Tensor, ids_T: Tensor | None, backend: ops.Backend
    ) -> tuple[Tensor | None, Tensor | None]:
        """This layer's pools of the micro-batch, and the scores that chose the pools.

        Returns:
            Pools [D, E] bool, chosen once and stored for recompute; None: all experts. And scores [D, E] int64; None:
            the pools were not chosen in this call.
        """
        if not self.pool.is_on or (not self.training and self.pool.pool_eval is None):
            return None, None
        scope = self.scope
        if scope is None or ids_T is None:
            raise ValueError(
                "Pools need document boundaries, and this forward pass got none. Train with "
                "--dataloader-inter-document-masking, or pass PackedSeqParams to the model; with --pool-documents "
                "routers, call the model through emo_megatron.mcore.router_documents.forward_with_documents."
            )
        if self._is_standard or self.layer_number in scope.pools:
            return scope.pools.get(self.layer_number), None
        scores_DE, choosing_DE = self._document_scores(logits_TE, ids_T, scope, backend)
        if self.allowed_experts is not None:
            # otherwise an expert bias could select an expert that is not allowed
            lowest = torch.iinfo(torch.int64).min
            choosing_DE = choosing_DE.masked_fill(~self.allowed_experts, lowest)
        choosing_DE, sizes_D = self._within_groups(choosing_DE, self._pool_sizes(scores_DE, scope))
        pool_DE = ops.select_pool(choosing_DE, pool_sizes_D=sizes_D, num_forced=self.pool.pool_forced, backend=backend)
        scope.pools[self.layer_number] = pool_DE
        return pool_DE, scores_DE

    def _document_scores(
        self, logits_TE: Tensor, ids_T: Tensor, scope: PoolScope, backend: ops.Backend
    ) -> tuple[Tensor, Tensor]:
        """Each document's scores, summed over all ranks that share the document; and the scores that choose its pool.

        Both are [D, E] int64 in units of 2**-27. They differ by the expert bias, which is equal on all ranks in a step.
        """
        is_biased = self.pool.pool_score == "gate_with_bias"
        documents: dict[str, Any] = {"document_ids_T": ids_T, "num_documents": scope.segments.num_documents}
        scores_DE = ops.document_scores(
            logits_TE, **documents, score_function=self.score_function if is_biased else "softmax", backend=backend
        )
        sums_DX = scores_DE
        if is_biased:
            # one all-reduce sums the scores and the token counts, by which the bias is multiplied
            tokens_D = ops.document_tokens(logits_TE, **documents)
            sums_DX = torch.cat([scores_DE, tokens_D[:, None]], dim=1)
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(sums_DX, group=self.tp_cp_group)
        if not is_biased:
            return sums_DX, sums_DX
        scores_DE, tokens_D1 = sums_DX.split([scores_DE.shape[1], 1], dim=1)
        assert self.expert_bias is not None, "check_run requires a bias"
        return scores_DE, ops.biased_scores(scores_DE, tokens_D1[:, 0], self.expert_bias)

    def _within_groups(self, choosing_DE: Tensor, sizes_D: Tensor) -> tuple[Tensor, Tensor]:
        """Pool scores and sizes; with pool_group_scope=document limited to groups (ops.limit_to_groups)."""
        if self.pool.pool_group_scope == "token" or self.num_groups is None:
            return choosing_DE, sizes_D
        return ops.limit_to_groups(
            choosing_DE,
            sizes_D,
            num_groups=self.num_groups,
            group_topk=self.config.moe_router_group_topk,
            top_k=self.topk,
        )

    def _pool_sizes(self, scores_DE: Tensor, scope: PoolScope) -> Tensor:
        num_experts = scores_DE.shape[1]
        if not self.training and self.pool.pool_eval is not None:
            return torch.full_like(scope.sample_positions_D, self.pool.pool_eval)
        low, high = self.pool.size_bounds(num_experts=self.most_in_pool, consumed_samples=scope.consumed_samples)
        if self.pool.pool_rule == "top_p":
            assert self.pool.pool_top_p is not None
            return ops.top_p_pool_sizes(scores_DE, top_p=self.pool.pool_top_p, low=low, high=high)
        bounds = {"low": low, "high": high, "num_experts": num_experts}
        sizes_LD = scope.draw_sizes(self.pool, num_layers=num_rows(self.config), **bounds)
        return sizes_LD[self.layer_number - 1]

    def _count_for_bias(self, routed: ops.Routing) -> None:
        """Replaces Megatron's `_apply_expert_bias`, whose mask has another form in each Megatron version."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.local_tokens_per_expert += routed.tokens_per_expert_E

    def _dispatched_map(self, routing_map_TE: Tensor, ids_T: Tensor | None) -> Tensor:
        """The routing map; without padding tokens if the dispatcher allows that (leaves_padding_out)."""
        if ids_T is None or not leaves_padding_out(self.config):
            # cloned, because Megatron's dispatchers write quantisation padding into the map, which backward reads
            pads = self.config.moe_router_padding_for_quantization
            return routing_map_TE.clone() if pads else routing_map_TE
        return routing_map_TE & (ids_T >= 0)[:, None]


@functools.cache
def tell_backend(reason: str) -> None:
    """Print on rank 0, once per reason, why the compiled ops do not run."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"emo_megatron: routing runs in plain PyTorch, which is slower: {reason}", flush=True)
