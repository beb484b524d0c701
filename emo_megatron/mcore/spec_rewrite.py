"""One layer's spec rewritten: Megatron's layer, MoE layer and router give way to the pools', all else stays."""

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


def pool_layer(layer: ModuleSpec, *, config: TransformerConfig, pool: PoolConfig) -> tuple[ModuleSpec, bool]:
    """The layer with PoolTransformerLayer, and PoolMoELayer and PoolRouter where it is an MoE layer.

    Of the local spec also as `document_layer` makes it.

    Returns:
        The new spec, and whether it is an MoE layer.
    """
    # the second differs from the first in its CUDA graphs only, and those are refused
    of_megatron = TransformerLayer, MoETransformerLayer
    module = _with_own(PoolTransformerLayer, _class_of(layer), of_megatron, own={"__init__"})
    if module is None:
        raise ValueError(
            f"pools take the place of Megatron's TransformerLayer; this spec builds {layer.module}. "
            "Use a spec of TransformerLayer, or of a layer that overrides its __init__ alone"
        )
    mlp = _pool_mlp(layer.submodules.mlp, pool)
    has_pools = mlp is not layer.submodules.mlp
    attention = _with_whole_gradient(layer.submodules.self_attention)
    submodules = dataclasses.replace(layer.submodules, mlp=mlp, self_attention=attention)
    layer = dataclasses.replace(layer, module=module, submodules=submodules)
    if config.transformer_impl == "local":
        layer = document_layer(layer, config=config, pool=pool)
    return layer, has_pools


def document_layer(layer: ModuleSpec, *, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    """The layer of the local spec with norms and attention that take packed, sequence-parallel input."""
    submodules = with_torch_norms(layer.submodules)
    attention = submodules.self_attention
    if isinstance(attention, ModuleSpec):
        submodules = dataclasses.replace(submodules, self_attention=_document_attention(attention, config, pool))
    if config.add_bias_linear:
        submodules = dataclasses.replace(submodules, mlp=_with_addable_outputs(submodules.mlp))
    return dataclasses.replace(layer, submodules=submodules)


def with_torch_norms[Submodules](submodules: Submodules) -> Submodules:
    """The same submodules with TorchNorm where Megatron's norm, which refuses sequence parallelism, was."""
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
    """An MoE layer's spec whose experts can add their biases; a dense one as it is."""
    moe: Any = getattr(mlp, "keywords", {}).get("submodules")
    experts: Any = getattr(moe, "experts", None)
    parts: Any = getattr(experts, "keywords", {}).get("submodules")
    if getattr(parts, "linear_fc2", None) is not RowParallelLinear:
        return mlp
    parts = dataclasses.replace(parts, linear_fc2=AddableRowParallelLinear)
    moe = dataclasses.replace(moe, experts=functools.partial(experts, submodules=parts))
    return functools.partial(mlp, submodules=moe)


def _with_whole_gradient(attention: Any) -> Any:
    """LatentAttention where tensor-parallel ranks have parts of the down projection that holds the positional key."""
    if getattr(attention, "module", None) is not MLASelfAttention:
        return attention
    projection = _class_of(getattr(attention.submodules, "linear_kv_down_proj", None))
    if projection is None or "ColumnParallel" not in projection.__name__:
        return attention
    return dataclasses.replace(attention, module=LatentAttention)


def _pool_mlp(mlp: Any, pool: PoolConfig) -> Any:
    """An MoE layer's spec with pools; a dense one as it is."""
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
    what = "an MoE layer of its own" if kind and issubclass(kind, BaseMoELayer) else "its own mlp"
    raise ValueError(
        f"PoolMoELayer takes the place of Megatron's MoELayer; this spec has {what}, {mlp!r}, which may hold experts "
        "that would see no pools. Use a spec of MoELayer with MoESubmodules, and of MLP where a layer is dense"
    )


def _pool_router(spec: Any) -> type[PoolRouter]:
    """PoolRouter, over a recipe's own router where that has no more than a projection of its own."""
    router = _with_own(PoolRouter, _class_of(spec), (TopKRouter,), own={"gating"})
    if router is not None:
        return router
    raise ValueError(
        f"PoolRouter takes the place of Megatron's TopKRouter; this spec's router is {spec!r}, whose choice of experts "
        "would be lost. Use a recipe with TopKRouter, or with a router that overrides its gating alone"
    )


def _with_own[Pooled](
    pooled: type[Pooled], kind: type | None, of_megatron: tuple[type, ...], *, own: set[str]
) -> type[Pooled] | None:
    """The class of pools in the place of Megatron's; over a recipe's own that overrides `own` alone; else None."""
    if kind in of_megatron:
        return pooled
    base = of_megatron[0]
    if kind is None or not issubclass(kind, base):
        return None
    own_classes = kind.__mro__[: kind.__mro__.index(base)]
    overridden = {n for cls in own_classes for n, value in vars(cls).items() if callable(value)}
    return type(f"Pool{kind.__name__}", (pooled, kind), {}) if overridden == own else None


def _class_of(spec: Any) -> type | None:
    """The class that a spec builds: of a ModuleSpec, a partial, a class method, or itself; None for a function."""
    if isinstance(spec, functools.partial):
        spec = spec.func
    if isinstance(spec, ModuleSpec):
        spec = get_module(spec)
    spec = getattr(spec, "__self__", spec)
    return spec if isinstance(spec, type) else None
