"""Rewrites one layer's spec: pool classes replace Megatron's layer, MoE layer and router; other modules stay."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import LNImpl
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.attention import DocumentAttention, LatentAttention, require_supported
from emo_megatron.mcore.layer import PoolMoELayer, PoolTransformerLayer
from emo_megatron.mcore.local import AddableRowParallelLinear, TorchNorm
from emo_megatron.mcore.router import PoolRouter


def pool_layer(layer: ModuleSpec, *, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    """The layer with PoolTransformerLayer; an MoE layer also gets PoolMoELayer and PoolRouter.

    A layer of the local spec also gets the changes of `document_layer`.
    """
    # MoETransformerLayer differs from TransformerLayer only in CUDA graphs, which are not supported
    of_megatron = TransformerLayer, MoETransformerLayer
    module = _with_own(PoolTransformerLayer, _class_of(layer), of_megatron, own={"__init__"})
    if module is None:
        raise ValueError(
            f"the layer must be Megatron's TransformerLayer, which PoolTransformerLayer replaces; got {layer.module}. "
            "Use TransformerLayer, or a subclass that overrides only __init__"
        )
    mlp = _pool_mlp(layer.submodules.mlp, pool)
    attention = _with_whole_gradient(layer.submodules.self_attention)
    submodules = dataclasses.replace(layer.submodules, mlp=mlp, self_attention=attention)
    layer = dataclasses.replace(layer, module=module, submodules=submodules)
    return document_layer(layer, config=config, pool=pool) if config.transformer_impl == "local" else layer


def has_pools(layer: Any) -> bool:
    """Whether this is the spec of an MoE layer with pools."""
    return _class_of(getattr(getattr(layer, "submodules", None), "mlp", None)) is PoolMoELayer


def document_layer(layer: ModuleSpec, *, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    """The local spec's layer with norms and attention that support packed sequences and sequence parallelism."""
    submodules = with_torch_norms(layer.submodules)
    attention = submodules.self_attention
    if isinstance(attention, ModuleSpec):
        submodules = dataclasses.replace(submodules, self_attention=_document_attention(attention, config, pool))
    if config.add_bias_linear:
        submodules = dataclasses.replace(submodules, mlp=_with_addable_outputs(submodules.mlp))
    return dataclasses.replace(layer, submodules=submodules)


def with_torch_norms[Submodules](submodules: Submodules) -> Submodules:
    """The submodules with TorchNorm instead of Megatron's norm, which does not support sequence parallelism."""
    norms: Any = [
        field.name
        for field in dataclasses.fields(submodules)  # type: ignore[arg-type]
        if any(getattr(submodules, field.name) is norm for norm in (LNImpl, WrappedTorchNorm))
    ]
    return dataclasses.replace(submodules, **dict.fromkeys(norms, TorchNorm))  # type: ignore[type-var]


def _document_attention(attention: ModuleSpec, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    submodules = attention.submodules
    if not dataclasses.is_dataclass(submodules):
        return attention
    submodules = with_torch_norms(submodules)
    if _class_of(getattr(submodules, "core_attention", None)) is DotProductAttention:
        require_supported(config)
        core = ModuleSpec(module=DocumentAttention, params={"cp_partition": pool.pool_cp_partition})
        submodules = dataclasses.replace(submodules, core_attention=core)  # type: ignore[type-var]
    return dataclasses.replace(attention, submodules=submodules)


def _with_addable_outputs(mlp: Any) -> Any:
    """An MoE layer's spec whose experts can add biases; a dense layer's spec unchanged."""
    moe: Any = getattr(mlp, "keywords", {}).get("submodules")
    experts: Any = getattr(moe, "experts", None)
    parts: Any = getattr(experts, "keywords", {}).get("submodules")
    if getattr(parts, "linear_fc2", None) is not RowParallelLinear:
        return mlp
    parts = dataclasses.replace(parts, linear_fc2=AddableRowParallelLinear)
    moe = dataclasses.replace(moe, experts=functools.partial(experts, submodules=parts))
    return functools.partial(mlp, submodules=moe)


def _with_whole_gradient(attention: Any) -> Any:
    """LatentAttention where tensor-parallel ranks split the down projection that includes the positional key."""
    if getattr(attention, "module", None) is not MLASelfAttention:
        return attention
    projection = _class_of(getattr(attention.submodules, "linear_kv_down_proj", None))
    if projection is None or "ColumnParallel" not in projection.__name__:
        return attention
    return dataclasses.replace(attention, module=LatentAttention)


def _pool_mlp(mlp: Any, pool: PoolConfig) -> Any:
    """An MoE layer's spec with pools; a dense layer's spec unchanged."""
    kind = _class_of(mlp)
    is_partial = isinstance(mlp, functools.partial)
    submodules = mlp.keywords.get("submodules") if is_partial else getattr(mlp, "submodules", None)
    if kind is MoELayer and isinstance(submodules, MoESubmodules):
        router = functools.partial(_pool_router(submodules.router), pool=pool)
        moe = dataclasses.replace(submodules, router=router)
        if is_partial:
            return functools.partial(PoolMoELayer, *mlp.args, **mlp.keywords | {"submodules": moe})
        return dataclasses.replace(mlp, module=PoolMoELayer, submodules=moe)
    if kind is not None and issubclass(kind, MLP | IdentityOp):
        return mlp
    what = "an MoE layer of its own" if kind and issubclass(kind, BaseMoELayer) else "an mlp of its own"
    raise ValueError(
        f"the mlp must be Megatron's MoELayer, which PoolMoELayer replaces, or a dense MLP; got {what}, {mlp!r}, whose "
        "experts would have no pools. Use MoELayer with MoESubmodules, or MLP for a dense layer"
    )


def _pool_router(spec: Any) -> type[PoolRouter]:
    """PoolRouter; for a recipe's router that overrides only `gating`, a PoolRouter with that `gating`."""
    router = _with_own(PoolRouter, _class_of(spec), (TopKRouter,), own={"gating"})
    if router is not None:
        return router
    raise ValueError(
        f"the router must be Megatron's TopKRouter, which PoolRouter replaces; got {spec!r}, whose choice of experts "
        "would be lost. Use a recipe with TopKRouter, or with a router that overrides only gating"
    )


def _with_own[Pooled](
    pooled: type[Pooled], kind: type | None, of_megatron: tuple[type, ...], *, own: set[str]
) -> type[Pooled] | None:
    """The class that replaces `kind`; None if `kind` cannot be replaced.

    `pooled` for Megatron's classes; for a recipe's subclass that overrides exactly `own`, a subclass of both.
    """
    if kind in of_megatron:
        return pooled
    base = of_megatron[0]
    if kind is None or not issubclass(kind, base):
        return None
    own_classes = kind.__mro__[: kind.__mro__.index(base)]
    overridden = {n for cls in own_classes for n, value in vars(cls).items() if callable(value)}
    return type(f"Pool{kind.__name__}", (pooled, kind), {}) if overridden == own else None


def _class_of(spec: Any) -> type | None:
    """The class that a spec builds; a spec is a ModuleSpec, a partial, a class method or a class. None: a function."""
    if isinstance(spec, functools.partial):
        spec = spec.func
    if isinstance(spec, ModuleSpec):
        spec = get_module(spec)
    spec = getattr(spec, "__self__", spec)
    return spec if isinstance(spec, type) else None
