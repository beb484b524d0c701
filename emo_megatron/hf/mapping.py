"""The model that the Hugging Face formats describe, and one table of its tensors in Megatron and in Qwen2-MoE.

The model is a pre-norm decoder with RMSNorm, rotary positions, multi-head or grouped-query attention, and gated SiLU
MLPs. The MLP of a layer is dense or a softmax-routed mixture of experts with at most one always-on MLP, the shared
expert. (Several shared experts are equivalent to one shared expert of the summed width.)

In names, the first `*` stands for a layer and the second `*` for a routed expert; both count from 0. Shapes belong to
the Hugging Face tensors and are written in letters:

    V vocabulary     Q heads * head width             E experts          I width of a dense layer's MLP
    D hidden size    K key-value heads * head width   F width of one     S width of the shared expert

This package uses the Qwen2-MoE name of every weight, with the value that Megatron has. The table does not depend on
files. Megatron-Bridge can use the table for its registry of mappings, with one mapping per row:

    plain      AutoMapping(megatron_param, hf_param)
    qkv        QKVMapping(megatron_param, q, k, v): for each query group its q heads, its k, its v
    gate_up    GatedMLPMapping(megatron_param, gate, up): gate first, then up
    doubled    AutoMapping whose megatron_to_hf doubles the weight, because the constant gate of Qwen2-MoE halves it

A checkpoint stacks routed experts in one tensor, `mlp.experts.experts.linear_fc1.weight`; Bridge maps the parameters of
the module, `mlp.experts.linear_fc1.weight*`. A row with `needs` applies to models with that property. For a model
without the property, Megatron has no tensor, and the Hugging Face tensor is a constant, `fill`, which Bridge writes and
does not read. Bridge itself handles the two names of a norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Sizes and switches of a model; construction raises ValueError for impossible sizes."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    """Routed experts per MoE layer, without the shared expert."""
    top_k: int
    """Routed experts per token."""
    expert_hidden: int
    """Width of a routed expert."""
    shared_hidden: int = 0
    """Width of the shared expert; 0 if there is none."""
    dense_hidden: int = 0
    """Width of the MLP of dense layers; 0 if there are none."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, from 0, ascending."""
    renormalise: bool = False
    """Whether the top-k probabilities of a token are scaled to sum to 1."""
    rope_theta: float = 10000.0
    max_positions: int
    norm_eps: float
    tied: bool = False
    """Whether the output projection and the embedding share one weight."""
    qkv_bias: bool = False
    shared_gate: bool = False
    """Whether the shared expert's output is scaled by the sigmoid of a learned projection; otherwise by 1."""

    def __post_init__(self) -> None:
        checks = {
            f"top-k must be in [1, experts]; got {self.top_k} of {self.num_experts}": (
                1 <= self.top_k <= self.num_experts
            ),
            f"heads must be a multiple of key-value heads; got {self.num_heads} and {self.num_kv_heads}": (
                self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
            ),
            f"dense layers must be ascending numbers in [0, {self.num_layers}); got {self.dense_layers}": (
                list(self.dense_layers) == sorted(set(self.dense_layers) & set(range(self.num_layers)))
            ),
            "at least one layer must have experts": len(self.dense_layers) < self.num_layers,
            "dense layers must have a width above 0": not self.dense_layers or self.dense_hidden > 0,
            "a gate of the shared expert requires a shared expert": (not self.shared_gate or self.shared_hidden > 0),
        }
        problems = [problem for problem, holds in checks.items() if not holds]
        if problems:
            raise ValueError("the sizes of the model are impossible: " + "; ".join(problems))

    @property
    def untied(self) -> bool:
        """Whether the output projection has its own weight."""
        return not self.tied

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, from 0."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)


Kind = Literal["plain", "qkv", "gate_up", "doubled"]
NormPlace = Literal["mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"]
FUSED_NORM: NormPlace = "mlp.linear_fc1.layer_norm_weight"
"""Name of an MoE layer's norm in checkpoints of Megatron's local layers, and of a dense layer's norm in all."""
OWN_NORM: NormPlace = "pre_mlp_layernorm.weight"
"""Name of an MoE layer's norm in checkpoints of Transformer Engine's layers."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: a Megatron tensor and the Hugging Face tensors with the same values."""

    megatron: str
    weights: Mapping[str, str]
    """Names in Hugging Face -> shapes, in the order in which Megatron joins the weights."""
    kind: Kind = "plain"
    _: KW_ONLY
    layers: Literal["all", "moe", "dense"] = "all"
    needs: Literal["qkv_bias", "shared_hidden", "shared_gate", "untied"] | None = None
    """Field of `Architecture` that must be true; otherwise Megatron has no such tensor."""
    fill: float | None = None
    """The constant in the Hugging Face tensors if Megatron has no such tensor; None: Hugging Face has none either."""

    @property
    def is_of_experts(self) -> bool:
        """Whether the Megatron tensor stacks one part per routed expert."""
        return any(name.count("*") > 1 for name in self.weights)


_M, _H = "decoder.layers.*.", "model.layers.*."


def _mlp(megatron: str, weights: str, width: str, down: Kind = "plain", **options: Any) -> tuple[Row, Row]:
    """The two rows of a gated MLP: down(silu(gate x) * up x)."""
    both = {f"{_H}{weights}.{name}_proj.weight": f"{width}D" for name in ("gate", "up")}
    return (
        Row(f"{_M}{megatron}.linear_fc1.weight", both, "gate_up", **options),
        Row(f"{_M}{megatron}.linear_fc2.weight", {f"{_H}{weights}.down_proj.weight": f"D{width}"}, down, **options),
    )


def _qkv(end: str, columns: str, **options: Any) -> Row:
    """The row of q, k and v."""
    parts = {f"{_H}self_attn.{name}_proj.{end}": f"{rows}{columns}" for name, rows in zip("qkv", "QKK", strict=True)}
    return Row(f"{_M}self_attention.linear_qkv.{end}", parts, "qkv", **options)


TABLE = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "VD"}),
    Row(f"{_M}self_attention.linear_qkv.layer_norm_weight", {f"{_H}input_layernorm.weight": "D"}),
    _qkv("weight", "D"),
    _qkv("bias", "", needs="qkv_bias", fill=0.0),
    Row(f"{_M}self_attention.linear_proj.weight", {f"{_H}self_attn.o_proj.weight": "DQ"}),
    # or OWN_NORM
    Row(f"{_M}{FUSED_NORM}", {f"{_H}post_attention_layernorm.weight": "D"}),
    *_mlp("mlp", "mlp", "I", layers="dense"),
    Row(f"{_M}mlp.router.weight", {f"{_H}mlp.gate.weight": "ED"}, layers="moe"),
    *_mlp("mlp.experts.experts", "mlp.experts.*", "F", layers="moe"),
    *_mlp("mlp.shared_experts", "mlp.shared_expert", "S", "doubled", layers="moe", needs="shared_hidden", fill=0.0),
    Row(
        f"{_M}mlp.shared_experts.gate_weight",
        {f"{_H}mlp.shared_expert_gate.weight": "1D"},
        layers="moe",
        needs="shared_gate",
        fill=0.0,
    ),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "D"}),
    Row("output_layer.weight", {"lm_head.weight": "VD"}, needs="untied"),
)


@dataclass(frozen=True, slots=True)
class Joined:
    """A Megatron tensor of a model, and the weights that the tensor joins."""

    row: Row
    name: str
    shape: tuple[int, ...]
    weights: Mapping[str, tuple[int, ...]]
    """Name -> shape; in a tensor of experts, one expert after the other."""
    is_constant: bool
    """Whether Megatron has no such tensor for this model, and Hugging Face has a constant, `row.fill`."""


def tensors_of(architecture: Architecture, *, moe_norm: NormPlace = FUSED_NORM) -> Iterator[Joined]:
    """The table for one model, in the order of the layers; `moe_norm` is the name of the norm of MoE layers."""
    a = architecture
    sizes = {"V": a.vocab_size, "D": a.hidden_size, "Q": a.num_heads * a.head_dim, "K": a.num_kv_heads * a.head_dim}
    # a missing shared expert is written with the width of a routed expert, because not every loader accepts width 0
    widths = {"F": a.expert_hidden, "S": a.shared_hidden or a.expert_hidden, "I": a.dense_hidden}
    sizes |= widths | {"E": a.num_experts, "1": 1}
    for is_in_layer, group in groupby(TABLE, key=lambda row: "*" in row.megatron):
        rows = tuple(group)
        for layer in range(a.num_layers if is_in_layer else 1):
            other = "moe" if layer in a.dense_layers else "dense"
            for row in rows:
                is_constant = row.needs is not None and not getattr(a, row.needs)
                if row.layers == other or (is_constant and row.fill is None):
                    continue
                name = row.megatron.replace("*", str(layer))
                yield _joined(
                    row, name if other == "moe" else name.replace(FUSED_NORM, moe_norm), layer, sizes, is_constant
                )


def _joined(row: Row, name: str, layer: int, sizes: Mapping[str, int], is_constant: bool) -> Joined:
    parts = {weight.replace("*", str(layer), 1): [sizes[axis] for axis in axes] for weight, axes in row.weights.items()}
    num_rows, rest = sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1:]
    experts = range(sizes["E"]) if row.is_of_experts else range(1)
    return Joined(
        row=row,
        name=name,
        shape=(*([len(experts)] if row.is_of_experts else []), num_rows, *rest),
        weights={weight.replace("*", str(e)): tuple(shape) for e in experts for weight, shape in parts.items()},
        is_constant=is_constant,
    )


def weight_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape, in the order of the model."""
    return {
        name: shape
        for tensor in tensors_of(architecture)
        if not tensor.is_constant
        for name, shape in tensor.weights.items()
    }


def into_groups(qkv: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Join q, k and v, [heads * head_dim, ...], as Megatron does: for each query group its q heads, its k, its v."""
    groups = architecture.num_kv_heads
    cut = [t.reshape(groups, -1, architecture.head_dim, *t.shape[1:]) for t in qkv]
    return torch.cat(cut, dim=1).reshape(-1, *qkv[0].shape[1:])


def out_of_groups(joined_qkv: Tensor, architecture: Architecture) -> list[Tensor]:
    """The inverse of `into_groups`."""
    a = architecture
    rest = joined_qkv.shape[1:]
    heads = joined_qkv.reshape(a.num_kv_heads, -1, a.head_dim, *rest)
    parts = heads.split([a.num_heads // a.num_kv_heads, 1, 1], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def shape_problems(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], *, optional: Sequence[str] = ()
) -> list[str]:
    """Differences between stored and wanted tensors, one sentence each; the tensors `optional` may be missing."""
    problems = [
        f"{len(names)} tensors {what}, for example {min(names)}"
        for what, names in (
            ("are missing", wanted.keys() - stored.keys() - set(optional)),
            ("have no place in the model", stored.keys() - wanted.keys()),
        )
        if names
    ]
    return (
        problems
        + [
            f"{name} must have the shape {list(wanted[name])}; got {list(shape)}"
            for name, shape in stored.items()
            if name in wanted and shape != wanted[name]
        ][:3]
    )
