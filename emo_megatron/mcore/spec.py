"""Layer specs: Megatron's own decoder spec with the pool router, layers and (without TE) document attention in it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.attention import DocumentAttention, TorchNorm
from emo_megatron.mcore.layer import PoolMoELayer, PoolTransformerLayer
from emo_megatron.mcore.refusals import problems_with_config
from emo_megatron.mcore.router import PoolRouter


def pool_block_spec(
    config: TransformerConfig, *, pool: PoolConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder of this pipeline stage with document pools in every MoE layer.

    Args:
        config: Megatron's; `transformer_impl` chooses Transformer Engine or the local spec, `moe_layer_freq` which
            layers are dense.
        pool: the method; pools off gives the matched standard MoE.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the pool layers would not do what the configuration says; names every problem.
        ImportError: Transformer Engine is asked for and missing.
        NotImplementedError: Megatron's spec builds another kind of layer.
    """
    problems = problems_with_config(pool, config)
    if problems:
        raise ValueError(
            "this model cannot be built with pool layers:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    uses_te = config.transformer_impl == "transformer_engine"
    if uses_te and not HAVE_TE:
        raise ImportError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not installed; "
            "install it, or use --transformer-impl local"
        )
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=uses_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    layers = [_with_pools(layer, pool) for layer in block.layer_specs]
    if uses_te:
        return dataclasses.replace(block, layer_specs=layers)
    return dataclasses.replace(
        block, layer_specs=[_with_documents(layer, pool) for layer in layers], layer_norm=TorchNorm
    )


def pool_spec_builder(pool: PoolConfig) -> Any:
    """A function of Megatron's `GPTModelConfig` (and vp_stage), the form its model builder calls."""

    def build(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        config = getattr(model_config, "transformer", model_config)
        return pool_block_spec(config, pool=pool, vp_stage=vp_stage)

    return build


def _with_pools(layer: ModuleSpec, pool: PoolConfig) -> ModuleSpec:
    """The same layer with PoolTransformerLayer, and PoolMoELayer and PoolRouter where it is an MoE layer."""
    if layer.module is not TransformerLayer:
        raise NotImplementedError(
            f"pools go into Megatron's TransformerLayer; this spec builds {layer.module}. "
            "Use a spec of TransformerLayer."
        )
    submodules = layer.submodules
    mlp = submodules.mlp
    if isinstance(mlp, functools.partial) and mlp.func is MoELayer:
        moe = dataclasses.replace(
            mlp.keywords["submodules"], router=functools.partial(PoolRouter, pool=pool)
        )
        submodules = dataclasses.replace(
            submodules, mlp=functools.partial(PoolMoELayer, submodules=moe)
        )
    return dataclasses.replace(layer, module=PoolTransformerLayer, submodules=submodules)


def _with_documents(layer: ModuleSpec, pool: PoolConfig) -> ModuleSpec:
    """The same layer of the local spec with norms and attention that take packed, sequence-parallel input."""
    attention = layer.submodules.self_attention
    attention = dataclasses.replace(
        attention,
        submodules=dataclasses.replace(
            attention.submodules,
            core_attention=ModuleSpec(
                module=DocumentAttention, params={"cp_partition": pool.pool_cp_partition}
            ),
        ),
    )
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=TorchNorm,
        pre_mlp_layernorm=TorchNorm,
        self_attention=attention,
    )
    return dataclasses.replace(layer, submodules=submodules)
