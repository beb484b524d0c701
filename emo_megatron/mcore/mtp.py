"""Pools in Megatron's layers of multi-token prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.compat import is_in_backward
from emo_megatron.mcore.layer import PoolTransformerLayer
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.spec_rewrite import pool_layer, with_torch_norms


class PoolMTPLayer(MultiTokenPredictionLayer):
    """One depth of multi-token prediction, or all of them, whose router is told the depth and the micro-batch.

    In a hybrid model the layers of a depth are a stack, which Megatron numbers from 1 at every depth. One layer for all
    depths (mtp_use_repeated_layer) runs once per depth: forward passes from depth 1 on, and those that recompute
    repeats from the last depth back, because each depth's input is the output of the one before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, PoolRouter)]
        if len(routers) > 1:
            raise ValueError(
                "--hybrid-layer-pattern must have at most one MoE layer (E) per depth of multi-token prediction; got "
                f"{len(routers)}: Megatron reports one MoE layer per depth"
            )
        for router in routers:
            # a hybrid stack does not tell its MoE layer
            router.is_mtp_layer = True
            router.set_layer_number(self.layer_number)
        if self.config.recompute_granularity == "full":
            # a hybrid stack recomputes its layers inside the depth that is recomputed
            for layer in getattr(self.mtp_model_layer, "layers", ()):
                layer.num_recomputed = 2
        self._routers = routers
        self._num_forward = self._num_backward = 0

    def _proj_and_transformer_layer(self, *args: Any, **kwargs: Any) -> Tensor:
        # Megatron tells the stack which micro-batch this is, and not its layers
        for layer in getattr(self.mtp_model_layer, "layers", ()):
            layer.current_microbatch = getattr(self.mtp_model_layer, "current_microbatch", 0)
        if self.config.mtp_use_repeated_layer:
            depth = self._next_depth()
            for router in self._routers:
                router.set_layer_number(depth)
        projected: Tensor = super()._proj_and_transformer_layer(*args, **kwargs)
        return projected

    def _next_depth(self) -> int:
        num_depths = self.config.mtp_num_layers
        if is_in_backward():
            self._num_backward = (self._num_backward + 1) % num_depths
            return int(num_depths - (self._num_backward - 1) % num_depths)
        self._num_forward = (self._num_forward + 1) % num_depths
        return int((self._num_forward - 1) % num_depths + 1)


def pool_mtp_block(
    block: MultiTokenPredictionBlockSubmodules, *, config: TransformerConfig, pool: PoolConfig
) -> MultiTokenPredictionBlockSubmodules:
    """The block with pools in every MoE layer; a layer that has them already stays."""
    layers = [_pool_mtp_layer(layer, config, pool) for layer in block.layer_specs or ()]
    return dataclasses.replace(block, layer_specs=layers)


def _pool_mtp_layer(layer: ModuleSpec, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    if get_module(layer) not in (MultiTokenPredictionLayer, PoolMTPLayer):
        raise ValueError(
            "pools take the place of Megatron's MultiTokenPredictionLayer; this spec builds "
            f"{layer.module}. Use a spec of MultiTokenPredictionLayer"
        )
    submodules = with_torch_norms(layer.submodules) if config.transformer_impl == "local" else layer.submodules
    inner = submodules.mtp_model_layer
    # a hybrid model has none: it builds a stack of the decoder's
    if inner is not None and not issubclass(get_module(inner), PoolTransformerLayer):
        inner = pool_layer(inner, config=config, pool=pool)
        submodules = dataclasses.replace(submodules, mtp_model_layer=inner)
    return dataclasses.replace(layer, module=PoolMTPLayer, submodules=submodules)
