"""PoolMoELayer and PoolTransformerLayer: Megatron's layers, which also pass each micro-batch's scope to the router.

The transformer layer receives the document boundaries, and the MoE layer calls the router. With --recompute-modules
moe the MoE layer runs again in backward, when a scope stored on a module may belong to another micro-batch. Therefore
the MoE layer makes the activation checkpoint itself, and the checkpoint's closure carries the scope.
"""

from __future__ import annotations

from typing import Any, cast

from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from emo_megatron.mcore.context import PoolScope, Shard, scope_of
from emo_megatron.mcore.dispatcher import PoolAlltoAllDispatcher, follow_routing_map
from emo_megatron.mcore.reruns import follow_reruns
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.router_documents import BOTH, current_documents


class PoolMoELayer(MoELayer):
    """An MoE layer whose router gets the documents of the micro-batch, in forward and in recompute.

    Attributes:
        scope: set by PoolTransformerLayer for the next call, which resets it to None.
    """

    scope: PoolScope | None = None
    moe_layer_recompute: bool

    def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        if self.pool_router.pool.pool_dispatcher == "dedup":
            # not by name in Megatron's configuration, because Megatron accepts only its own dispatcher names
            self.token_dispatcher = PoolAlltoAllDispatcher(
                self.num_local_experts, config=self.config, pg_collection=pg_collection
            )
        else:
            follow_routing_map(self.token_dispatcher, self.config)
            follow_reruns(self.token_dispatcher, self.pool_router)
        self.recomputes_itself = self.moe_layer_recompute
        self.moe_layer_recompute = False

    @property
    def pool_router(self) -> PoolRouter:
        """The PoolRouter, also if an adapter wraps the router."""
        return cast(PoolRouter, getattr(self.router, "to_wrap", self.router))

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> Any:
        """MoELayer.forward, with the same shapes."""
        scope, depth = self.scope, self.pool_router.mtp_depth

        def run(hidden_states: Tensor) -> Any:
            # needed in recompute: by then self.scope and the depth may be those of another pass
            self.scope = scope
            if depth:
                self.pool_router.set_layer_number(depth)
            return super(PoolMoELayer, self).forward(hidden_states, intermediate_tensors, padding_mask)

        if not (self.recomputes_itself and self.training):
            return run(hidden_states)
        if self.config.fp8 or self.config.fp4:
            # Transformer Engine's checkpoint keeps the quantisation scales of the first pass
            rng_tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te_checkpoint(run, False, rng_tracker, self.tp_group, hidden_states)
        return tensor_parallel.checkpoint(run, False, hidden_states)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """MoELayer.route, with `scope` given to the router; no other method does so.

        Megatron's schedule with overlapped expert-parallel communication calls `route` directly, without `forward`.
        """
        scope, self.scope = self.scope, None
        self.pool_router.scope = scope
        try:
            return super().route(hidden_states, padding_mask)
        finally:
            self.pool_router.scope = None


class PoolTransformerLayer(TransformerLayer):
    """A transformer layer that passes the micro-batch's scope to its MoE layer. `forward` is not overridden.

    Attributes:
        num_recomputed: how often full recompute repeats the layer in one backward pass.
    """

    num_recomputed: int = 1

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.mlp, PoolMoELayer):
            self.mlp.scope = self._scope(hidden_states, kwargs.get("packed_seq_params"))
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def _scope(self, hidden_states: Tensor, packed: PackedSeqParams | None) -> PoolScope | None:
        router = self.mlp.pool_router
        pool = router.pool
        shape, shard, number = hidden_states.shape, self._shard(), router.layer_number
        if pool.pool_documents == "attention":
            return scope_of(packed, hidden_shape=shape, shard=shard, pool=pool, layer_number=number)
        if packed is not None:
            raise ValueError(BOTH)
        documents = current_documents()
        if documents is None:
            return None
        return documents.scope_for(
            number, hidden_shape=shape, shard=shard, pool=pool, num_recomputed=self.num_recomputed
        )

    def _maybe_unflatten_for_moe(
        self, hidden_states: Tensor, padding_mask: Tensor | None, packed_seq_params: PackedSeqParams | None
    ) -> tuple[Tensor, Tensor | None, None]:
        """Keep the flat packed order, which is the order of the document ids."""
        return hidden_states, padding_mask, None

    def _shard(self) -> Shard:
        groups, router = self.pg_collection, self.mlp.pool_router
        splits_sequence = self.config.sequence_parallel
        # not every host's pg_collection has `dp`; in the router's group the data-parallel index varies slowest
        sharing, all_ranks = router.tp_cp_group, router.tp_dp_cp_group
        return Shard(
            tp_rank=groups.tp.rank() if splits_sequence else 0,
            tp_size=groups.tp.size() if splits_sequence else 1,
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            dp_rank=all_ranks.rank() // sharing.size(),
            dp_size=all_ranks.size() // sharing.size(),
            microbatch=getattr(self, "current_microbatch", 0) or 0,
        )
