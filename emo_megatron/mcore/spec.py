"""Specs with document pools, made from Megatron's spec, from a recipe's spec, or for `--spec` of Megatron's scripts."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from emo_megatron.config import PoolConfig, load_pool_config, raise_problems
from emo_megatron.mcore.args import check_run
from emo_megatron.mcore.combinations import problems_with_config
from emo_megatron.mcore.compat import require_megatron, training_args
from emo_megatron.mcore.local import local_stack_spec
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.mtp import pool_mtp_block
from emo_megatron.mcore.spec_rewrite import document_layer, has_pools, pool_layer, with_torch_norms
from emo_megatron.mcore.unsupported import HOST


def with_pools[
    Spec: ModuleSpec | TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules | Callable[..., Any]
](spec: Spec, *, config: TransformerConfig, pool: PoolConfig) -> Spec:
    """A model's spec with document pools in every MoE layer; the other modules stay unchanged.

    Replaced are Megatron's TransformerLayer, MoELayer and TopKRouter, and MLASelfAttention where its gradient is
    incomplete (attention.LatentAttention). A recipe's router that overrides only `gating` keeps its `gating`. With
    `transformer_impl` local, Megatron's norms and attention are replaced too, because these support neither packed
    sequences nor sequence parallelism.

    Args:
        spec: the spec of a transformer layer, of a block of layers, of a hybrid stack or of a block of multi-token
            prediction; or the submodules of a block; or a function that returns one of these, as recipes have. For a
            function the result is a function of the same signature, which raises the errors when it is called.
        config: the model's configuration.
        pool: the method's options; pools off gives the matched standard MoE.

    Returns:
        A new spec of the same kind. The given spec is not changed.
    """
    blocks = TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules
    if not isinstance(spec, ModuleSpec | blocks) and callable(spec):

        @functools.wraps(spec)
        def build(*args: Any, **kwargs: Any) -> Any:
            return with_pools(spec(*args, **kwargs), config=config, pool=pool)

        return build  # type: ignore[return-value]
    _check(config, pool)
    parts: Any = spec.submodules if isinstance(spec, ModuleSpec) else spec
    if isinstance(spec, ModuleSpec) and isinstance(parts, TransformerLayerSubmodules):
        layer = pool_layer(spec, config=config, pool=pool)
        _require_pools([layer])
        return layer
    if isinstance(parts, TransformerBlockSubmodules):
        parts = _pool_block(parts, config, pool)
    elif isinstance(parts, HybridStackSubmodules):
        parts = _pool_stack(parts, config, pool)
    elif isinstance(parts, MultiTokenPredictionBlockSubmodules):
        parts = pool_mtp_block(parts, config=config, pool=pool)
    else:
        raise ValueError(
            "the spec must be a ModuleSpec of a transformer layer, of a block of layers, of a hybrid stack or of a "
            "block of multi-token prediction; or the submodules of a block; or a function that returns one of these; "
            f"got {spec!r}"
        )
    return dataclasses.replace(spec, submodules=parts) if isinstance(spec, ModuleSpec) else parts


def pool_block_spec(
    config: TransformerConfig, *, pool: PoolConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Megatron's decoder of this pipeline stage, with document pools in every MoE layer.

    Args:
        config: Megatron's configuration. `transformer_impl` selects Transformer Engine or the local spec,
            `moe_layer_freq` the dense layers, `multi_latent_attention` and `experimental_attention_variant` the
            attention.
        pool: as in `with_pools`.
        vp_stage: virtual pipeline stage.
    """
    if getattr(config, "is_hybrid_model", False):
        raise ValueError(
            "--hybrid-layer-pattern requires HybridModel, and this spec is for GPTModel: drop the flag, or build "
            "HybridModel with emo_megatron.mcore.spec.pool_hybrid_spec"
        )
    _check(config, pool)
    if config.experimental_attention_variant is not None:
        block = get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
    else:
        block = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=config.transformer_impl == "transformer_engine",
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    return with_pools(block, config=config, pool=pool)


def pool_hybrid_spec(config: TransformerConfig, *, pool: PoolConfig) -> ModuleSpec:
    """HybridModel's stack with document pools in every MoE layer (`E` in the layer pattern).

    With `transformer_impl` local only attention (`*`), MLP (`-`) and MoE (`E`) layers are supported.
    """
    uses_te = config.transformer_impl == "transformer_engine"
    stack: ModuleSpec = hybrid_stack_spec if uses_te else local_stack_spec(config)
    return with_pools(stack, config=config, pool=pool)


def _pool_block(
    block: TransformerBlockSubmodules, config: TransformerConfig, pool: PoolConfig
) -> TransformerBlockSubmodules:
    layers = [pool_layer(layer, config=config, pool=pool) for layer in block.layer_specs]
    frequency = config.moe_layer_freq
    # a pipeline stage may have only dense layers, or no layers; the whole model must have an MoE layer
    has_sparse_layers = isinstance(frequency, int) or any(frequency)
    is_dense_stage = len(layers) < config.num_layers and frequency != 1 and has_sparse_layers
    if layers and not is_dense_stage:
        _require_pools(layers)
    block = dataclasses.replace(block, layer_specs=layers)
    return with_torch_norms(block) if config.transformer_impl == "local" else block


def _pool_stack(stack: HybridStackSubmodules, config: TransformerConfig, pool: PoolConfig) -> HybridStackSubmodules:
    """The stack with pools in its MoE layer, the only kind of layer with experts."""
    if isinstance(stack.moe_layer, ModuleSpec):
        stack = dataclasses.replace(stack, moe_layer=pool_layer(stack.moe_layer, config=config, pool=pool))
    _require_pools([stack.moe_layer])
    if stack.mtp_block_spec is not None:
        mtp = pool_mtp_block(stack.mtp_block_spec.submodules, config=config, pool=pool)
        mtp_spec = dataclasses.replace(stack.mtp_block_spec, submodules=mtp)
        stack = dataclasses.replace(stack, mtp_block_spec=mtp_spec)
    if config.transformer_impl != "local":
        return stack
    layers = {
        name: document_layer(layer, config=config, pool=pool)
        for name, layer in vars(stack).items()
        if isinstance(getattr(layer, "submodules", None), TransformerLayerSubmodules)
    }
    return dataclasses.replace(stack, **layers)


def _require_pools(layers: list[Any]) -> None:
    """Raise if no layer has pools: the model would silently be a standard one."""
    if any(map(has_pools, layers)):
        return
    kinds = sorted({repr(getattr(getattr(x, "submodules", x), "mlp", x)) for x in layers})
    raise ValueError(
        "pools require a layer whose mlp is Megatron's MoELayer; mlp in this spec is "
        f"{' or '.join(kinds) or 'missing'}. Check --num-experts and --moe-layer-freq"
    )


def _check(config: TransformerConfig, pool: PoolConfig) -> None:
    """Raise one error with all problems of this model."""
    problems = problems_with_config(pool, config)
    variant = getattr(config, "experimental_attention_variant", None)
    uses_te = config.transformer_impl == "transformer_engine"
    is_cut_by_sample = config.context_parallel_size > 1 and pool.pool_cp_partition == "sample"
    if config.multi_latent_attention and is_cut_by_sample and pool.pool_documents == "attention":
        problems.append(
            "--pool-cp-partition must be document with --multi-latent-attention and --context-parallel-size above 1; "
            "got 'sample'. Megatron's rotary embedding of packed latent keys requires that each document is cut "
            "separately. Alternatively give --pool-documents routers"
        )
    is_fused = config.multi_latent_attention and config.mla_down_proj_fusion
    if is_fused and config.tensor_model_parallel_size > 1:
        problems.append(
            "--mla-down-proj-fusion must not be given with --tensor-model-parallel-size above 1: Megatron would lose "
            "a part of the positional key's gradient (NVIDIA/Megatron-LM issue 1699)"
        )
    if variant is not None and not uses_te:
        problems.append(
            f"--experimental-attention-variant must not be given with --transformer-impl {config.transformer_impl}; "
            f"got {variant!r}. Megatron builds this attention from Transformer Engine's modules"
        )
    if variant == "dsa" and require_megatron() < (0, 19):
        problems.append(
            "--experimental-attention-variant dsa needs megatron-core 0.19: older versions attend across documents"
        )
    if config.moe_expert_rank_capacity_factor is not None and training_args() is None:
        warnings.warn(
            "--moe-expert-rank-capacity-factor: a training loop other than Megatron's must call "
            "emo_megatron.mcore.reruns.raise_over_budget before every optimizer step, to detect dropped tokens",
            stacklevel=2,
        )
    raise_problems("this model cannot be built with pool layers", problems)
    if uses_te and not HAVE_TE:
        raise ImportError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not installed; "
            "install it, or use --transformer-impl local"
        )


def pool_spec_builder(pool: PoolConfig) -> Any:
    """A function of Megatron's `GPTModelConfig` (and vp_stage), in the form that Megatron's model builder calls.

    Layers of multi-token prediction get pools too. Megatron's builder makes these layers directly after this call,
    with a function that no option replaces. Until then that function is replaced in Megatron's module.
    """

    def build(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        config = getattr(model_config, "transformer", model_config)
        block = pool_block_spec(config, pool=pool, vp_stage=vp_stage)
        if config is not model_config and config.mtp_num_layers:
            _pool_prediction(model_config, pool)
        return block

    return build


def _pool_prediction(model_config: Any, pool: PoolConfig) -> None:
    """Give pools to the multi-token prediction block that Megatron's builder makes next for this `GPTModelConfig`."""
    # imported here: Megatron-Core without megatron.training has no model builder
    from megatron.training.models import gpt

    # if an earlier build failed, its replacement is still in Megatron's module
    of_megatron = getattr(gpt.mtp_block_spec, "of_megatron", gpt.mtp_block_spec)

    def mtp_block_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        gpt.mtp_block_spec = of_megatron
        block = of_megatron(config, *args, **kwargs)
        if block is None or config is not model_config:
            return block
        return with_pools(block, config=config.transformer, pool=pool)

    mtp_block_spec.of_megatron = of_megatron  # type: ignore[attr-defined]
    gpt.mtp_block_spec = mtp_block_spec


POOL_CONFIG_VARIABLE = "EMO_POOL_CONFIG"
"""Environment variable: path of a PoolConfig's JSON file, for Megatron's scripts, whose parser lacks --pool-* flags."""


def pool_layer_spec(model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder of this pipeline stage, for pretrain_gpt.py `--spec emo_megatron.mcore.spec pool_layer_spec`.

    Megatron 0.19 and later call this function from the model builder, with a GPTModelConfig.
    """
    pool = _prepare_script(model_config.transformer)
    return pool_spec_builder(pool)(model_config, vp_stage)


class _StackOfScript:
    """Builds the stack of pool_hybrid_spec when the model is built."""

    def __new__(cls, config: TransformerConfig, submodules: HybridStackSubmodules | None = None, **options: Any) -> Any:
        stack = pool_hybrid_spec(config, pool=_prepare_script(config))
        # HybridModel reads the block of multi-token prediction from these submodules, after this stack is built
        pool_hybrid_layer_spec.submodules = stack.submodules
        return build_module(stack, config, **options)


# a spec, not a function: HybridModel's builder does not call functions
pool_hybrid_layer_spec = ModuleSpec(module=_StackOfScript)
"""For pretrain_hybrid.py `--spec emo_megatron.mcore.spec pool_hybrid_layer_spec`."""


def _prepare_script(config: TransformerConfig) -> PoolConfig:
    """The pool options of a run of Megatron's own script, before anything is built.

    Does the work that pretrain_emo.py does before Megatron starts: check the flags, install the pool metrics, and
    prepare pipeline stages for packed micro-batches of several samples.
    """
    require_megatron()
    pool = _pool_config_of_environment()
    if pool.pool_documents == "routers":
        raise ValueError(
            "--pool-documents must be attention with --spec, because Megatron's scripts pass document boundaries to "
            "the attention; got 'routers'. Use examples/pretrain_emo.py."
        )
    args = training_args()
    if args is not None:
        check_run(pool, config, args, rows=HOST)
        most_samples = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
        is_packed = args.dataloader_inter_document_masking or args.sft
        # Megatron's forward step keeps the packed shape between stages, so stages must send shapes with the tensors
        config.variable_seq_lengths |= is_packed and args.pipeline_model_parallel_size > 1 and most_samples > 1
    has_documents = args is None or args.dataloader_inter_document_masking
    install_metrics(pool, config, has_documents=has_documents)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"emo_megatron: {pool}", flush=True)
    return pool


def _pool_config_of_environment() -> PoolConfig:
    path = os.environ.get(POOL_CONFIG_VARIABLE)
    if not path:
        raise ValueError(
            f"the environment variable {POOL_CONFIG_VARIABLE} must be the path of a JSON file with PoolConfig's "
            f"fields; got none. For example: echo '{{\"pool_min\": 8}}' > pool.json; "
            f"export {POOL_CONFIG_VARIABLE}=$PWD/pool.json. For the standard MoE use an empty object, {{}}."
        )
    return load_pool_config(Path(path))
