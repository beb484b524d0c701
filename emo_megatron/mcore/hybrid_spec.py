"""HybridModel's stack without Transformer Engine, which Megatron has none of."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from emo_megatron.mcore.local_modules import TorchNorm


class LocalHybridStack(HybridStack):
    """Megatron's hybrid stack, whose final norm is Transformer Engine's, with torch's."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = TorchNorm(self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon)


class _NeedsTransformerEngine:
    """Stands where the local stack has no layer: Megatron would silently put one that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "without Transformer Engine a hybrid pattern may hold attention (*), MLP (-) and MoE (E) layers; "
            "use --transformer-impl transformer_engine"
        )


def local_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """The stack of attention, MLP and MoE layers: the two halves of GPT's local layers as layers of their own."""
    sparse, dense = (
        get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
        )
        for num_experts in (config.num_moe_experts, None)
    )
    halves = sparse.submodules
    attention = dataclasses.replace(
        sparse,
        submodules=TransformerLayerSubmodules(
            input_layernorm=halves.input_layernorm,
            self_attention=halves.self_attention,
            self_attn_bda=halves.self_attn_bda,
            sharded_state_dict_keys_map=halves.sharded_state_dict_keys_map,
        ),
    )
    moe, mlp = (
        dataclasses.replace(
            layer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer.submodules.pre_mlp_layernorm,
                mlp=layer.submodules.mlp,
                mlp_bda=layer.submodules.mlp_bda,
            ),
        )
        for layer in (sparse, dense)
    )
    layers = {
        field.name: _NeedsTransformerEngine
        for field in dataclasses.fields(HybridStackSubmodules)
        if field.name.endswith("_layer")
    }
    layers |= {"attention_layer": attention, "mlp_layer": mlp, "moe_layer": moe}
    submodules = HybridStackSubmodules(**layers, mtp_block_spec=_local_mtp_spec())
    return ModuleSpec(module=LocalHybridStack, submodules=submodules)


def _local_mtp_spec() -> ModuleSpec:
    """The block of multi-token prediction, whose layers are a stack of the decoder's."""
    layer = get_mtp_layer_spec_for_backend(None, backend=LocalSpecProvider())
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer])
    )
