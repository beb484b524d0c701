"""Layer specs: Megatron's own decoder spec with the pool router, layers and (without TE) document attention in it."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from emo_megatron.config import PoolConfig, load_pool_config
from emo_megatron.mcore.args import check_run
from emo_megatron.mcore.attention import DocumentAttention, TorchNorm
from emo_megatron.mcore.compat import require_megatron, training_args
from emo_megatron.mcore.layer import PoolMoELayer, PoolTransformerLayer
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.refusals import HOST_REFUSALS, problems_with_config
from emo_megatron.mcore.router import PoolRouter


def pool_block_spec(
    config: TransformerConfig, *, pool: PoolConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The decoder of this pipeline stage with document pools in every MoE layer.

    Args:
        config: Megatron's; `transformer_impl` chooses Transformer Engine or the local spec, `moe_layer_freq` which
            layers are dense.
        pool: the method; pools off gives the matched standard MoE. With `pool_documents` routers the model may have
            multi-token-prediction layers, without pools: make their spec from Megatron's own decoder spec.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: the pool layers would not do what the configuration says; names every problem.
        ImportError: Transformer Engine is asked for and missing.
        NotImplementedError: Megatron's spec builds another kind of layer.
    """
    if getattr(config, "is_hybrid_model", False):
        raise ValueError(
            "--hybrid-layer-pattern is for HybridModel, and these are GPTModel's layers: drop it, or build "
            "HybridModel with emo_megatron.mcore.spec.pool_hybrid_spec"
        )
    uses_te = _check(config, pool)
    options = {
        "use_transformer_engine": uses_te,
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }
    # of all stages: one may have dense layers only
    _require_places(get_gpt_decoder_layer_specs(config, **options))
    block = get_gpt_decoder_block_spec(config, **options, vp_stage=vp_stage)
    layers = [_with_pools(layer, pool) for layer in block.layer_specs]
    if uses_te:
        return dataclasses.replace(block, layer_specs=layers)
    return dataclasses.replace(
        block, layer_specs=[_with_documents(layer, pool) for layer in layers], layer_norm=TorchNorm
    )


def pool_hybrid_spec(config: TransformerConfig, *, pool: PoolConfig) -> ModuleSpec:
    """HybridModel's stack with document pools in every MoE layer, an `E` of its pattern.

    Args:
        config: Megatron's; with `transformer_impl` local there are attention (`*`), MLP (`-`) and MoE layers.
        pool: the method; pools off gives the matched standard MoE.

    Raises:
        ValueError, ImportError, NotImplementedError: as pool_block_spec.
    """
    if _check(config, pool):
        stack = hybrid_stack_spec.submodules
        _require_places([stack.moe_layer])
        moe_layer = _with_pools(stack.moe_layer, pool)
        return dataclasses.replace(
            hybrid_stack_spec, submodules=dataclasses.replace(stack, moe_layer=moe_layer)
        )
    return ModuleSpec(module=LocalHybridStack, submodules=_local_stack(config, pool))


class LocalHybridStack(HybridStack):
    """Megatron's hybrid stack, whose final norm is Transformer Engine's, with torch's."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = TorchNorm(
                self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon
            )


class _NeedsTransformerEngine:
    """Stands where the local stack has no layer: Megatron would silently put one that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "without Transformer Engine a hybrid pattern may hold attention (*), MLP (-) and MoE (E) layers; "
            "use --transformer-impl transformer_engine"
        )


def _local_stack(config: TransformerConfig, pool: PoolConfig) -> HybridStackSubmodules:
    """The two halves of GPT's local layers as layers of their own."""
    sparse, dense = (
        _with_documents(
            get_gpt_layer_local_spec(
                num_experts=num_experts,
                moe_grouped_gemm=config.moe_grouped_gemm,
                qk_layernorm=config.qk_layernorm,
                qk_l2_norm=config.qk_l2_norm,
                normalization=config.normalization,
            ),
            pool,
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
    _require_places([moe])
    layers = {
        field.name: _NeedsTransformerEngine
        for field in dataclasses.fields(HybridStackSubmodules)
        if field.name.endswith("_layer")
    }
    layers |= {"attention_layer": attention, "mlp_layer": mlp, "moe_layer": _with_pools(moe, pool)}
    return HybridStackSubmodules(**layers)


def _check(config: TransformerConfig, pool: PoolConfig) -> bool:
    """Raise what is wrong with this model; whether it is made of Transformer Engine's modules."""
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
    return uses_te


def pool_spec_builder(pool: PoolConfig) -> Any:
    """A function of Megatron's `GPTModelConfig` (and vp_stage), the form its model builder calls."""

    def build(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        config = getattr(model_config, "transformer", model_config)
        return pool_block_spec(config, pool=pool, vp_stage=vp_stage)

    return build


POOL_CONFIG_VARIABLE = "EMO_POOL_CONFIG"
"""Names the JSON file of a PoolConfig, for Megatron's scripts, whose parser does not know its flags."""


def pool_layer_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder of this pipeline stage, for pretrain_gpt.py `--spec emo_megatron.mcore.spec pool_layer_spec`.

    Args:
        model_config: Megatron's GPTModelConfig; its model builder calls this, from 0.19 on.
        vp_stage: virtual pipeline stage.

    Raises:
        ValueError: EMO_POOL_CONFIG is not set or names no valid configuration, or the run would not do what it says.
    """
    config = model_config.transformer
    return pool_block_spec(config, pool=_prepare_script(config), vp_stage=vp_stage)


class _StackOfScript:
    """Builds the stack of pool_hybrid_spec, when the model is built."""

    def __new__(cls, config: TransformerConfig, **options: Any) -> Any:
        return build_module(
            pool_hybrid_spec(config, pool=_prepare_script(config)), config, **options
        )


# a ready spec and no function: HybridModel's builder calls none
pool_hybrid_layer_spec = ModuleSpec(module=_StackOfScript)
"""For pretrain_hybrid.py `--spec emo_megatron.mcore.spec pool_hybrid_layer_spec`; errors as pool_layer_spec."""


def _prepare_script(config: TransformerConfig) -> PoolConfig:
    """The pools of a run of Megatron's own script, before anything is built.

    What pretrain_emo.py does before Megatron starts is done here: flags are checked, pool metrics installed, pipeline
    stages prepared for packed micro-batches of several samples.
    """
    require_megatron()
    pool = _pool_config_of_environment()
    if pool.pool_documents == "routers":
        raise ValueError(
            "--pool-documents must be attention with --spec, for Megatron's scripts hand boundaries to the attention; "
            "got 'routers'. Use examples/pretrain_emo.py."
        )
    args = training_args()
    if args is not None:
        from emo_megatron.mcore.pipeline import let_shapes_travel

        check_run(pool, config, args, refusals=HOST_REFUSALS)
        let_shapes_travel(config)
    has_documents = args is None or args.dataloader_inter_document_masking
    install_metrics(pool, config, has_documents=has_documents)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"emo_megatron: {pool}", flush=True)
    return pool


def _pool_config_of_environment() -> PoolConfig:
    path = os.environ.get(POOL_CONFIG_VARIABLE)
    if not path:
        raise ValueError(
            f"{POOL_CONFIG_VARIABLE} is not set, and without it this would be the standard MoE. Let it name a JSON "
            f"file of PoolConfig's fields: echo '{{\"pool_min\": 8}}' > pool.json; "
            f"export {POOL_CONFIG_VARIABLE}=$PWD/pool.json. An empty object, {{}}, is the standard MoE."
        )
    return load_pool_config(Path(path))


def _with_pools(layer: ModuleSpec, pool: PoolConfig) -> ModuleSpec:
    """The same layer with PoolTransformerLayer, and PoolMoELayer and PoolRouter where it is an MoE layer."""
    # the second differs from the first in its CUDA graphs only, and those are refused
    if layer.module not in (TransformerLayer, MoETransformerLayer):
        raise NotImplementedError(
            f"pools go into Megatron's TransformerLayer; this spec builds {layer.module}. "
            "Use a spec of TransformerLayer."
        )
    submodules = layer.submodules
    if _takes_pools(layer):
        moe = dataclasses.replace(
            submodules.mlp.keywords["submodules"], router=functools.partial(PoolRouter, pool=pool)
        )
        submodules = dataclasses.replace(
            submodules, mlp=functools.partial(PoolMoELayer, submodules=moe)
        )
    return dataclasses.replace(layer, module=PoolTransformerLayer, submodules=submodules)


def _takes_pools(layer: ModuleSpec) -> bool:
    """Whether this is an MoE layer in the form that Megatron's builders give it."""
    mlp = layer.submodules.mlp
    return isinstance(mlp, functools.partial) and mlp.func is MoELayer


def _require_places(layers: list[ModuleSpec]) -> None:
    """Refuse a model in which pools have no place: it would be a standard one, silently."""
    if any(_takes_pools(layer) for layer in layers):
        return
    kinds = sorted({repr(getattr(layer.submodules, "mlp", None)) for layer in layers})
    raise NotImplementedError(
        "no layer of this model can be given pools: pools go into layers whose mlp is a functools.partial of "
        f"Megatron's MoELayer; here mlp is {' or '.join(kinds)}. Check --num-experts and --moe-layer-freq, or use a "
        "supported megatron-core."
    )


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
