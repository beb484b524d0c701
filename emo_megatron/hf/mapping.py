"""The weights of `modules.hf.Architecture` in a Megatron checkpoint, both ways: names, joins and cuts.

Megatron joins q, k and v of every query group in one matrix, gate and up of an MLP in another, and experts on a first
axis. Names are those of checkpoint/names.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emo_megatron.checkpoint.names import EXPERTS
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight
from emo_megatron.hf.architecture import ATTENTION, Architecture, weight_shapes

NormPlace = Literal["mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"]
FUSED_NORM: NormPlace = "mlp.linear_fc1.layer_norm_weight"
"""Where a sparse layer's norm lies in checkpoints of Megatron's local layers, and a dense layer's in all."""
OWN_NORM: NormPlace = "pre_mlp_layernorm.weight"
"""Where it lies in checkpoints of Transformer Engine's layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """A Megatron tensor and the weights it is made of.

    Attributes:
        shape: of the tensor.
        weights: one after the other on the first axis; of a tensor of experts, expert after expert.
        kind: rows are the weights' own in order, those of query groups in turn, or one expert each.
    """

    shape: tuple[int, ...]
    weights: tuple[str, ...]
    kind: Literal["rows", "groups", "experts"] = "rows"


def joined(architecture: Architecture, *, moe_norm: NormPlace) -> dict[str, Joined]:
    """Every tensor of the Megatron checkpoint of a model, in its order.

    Args:
        architecture: the model.
        moe_norm: where the norm of sparse layers lies.
    """
    a = architecture
    shapes = weight_shapes(a)
    found: dict[str, Joined] = {}

    def add(name: str, *weights: str, kind: Literal["rows", "groups", "experts"] = "rows") -> None:
        first = shapes[weights[0]]
        rows = sum(shapes[weight][0] for weight in weights)
        shape = (rows, *first[1:])
        if kind == "experts":
            shape = (a.num_experts, rows // a.num_experts, *first[1:])
        found[name] = Joined(shape=shape, weights=weights, kind=kind)

    def add_mlp(module: str, weights: str) -> None:
        add(f"{module}linear_fc1.weight", f"{weights}gate", f"{weights}up")
        add(f"{module}linear_fc2.weight", f"{weights}down")

    add("embedding.word_embeddings.weight", "embedding")
    for layer in range(a.num_layers):
        m, w = f"decoder.layers.{layer}.", f"layers.{layer}."
        add(f"{m}self_attention.linear_qkv.layer_norm_weight", f"{w}attention_norm")
        add(f"{m}self_attention.linear_qkv.weight", *(w + name for name in ATTENTION), kind="groups")
        if a.qkv_bias:
            biases = (f"{w}{name}_bias" for name in ATTENTION)
            add(f"{m}self_attention.linear_qkv.bias", *biases, kind="groups")
        add(f"{m}self_attention.linear_proj.weight", f"{w}o")
        if layer in a.dense_layers:
            add(m + FUSED_NORM, f"{w}mlp_norm")
            add_mlp(f"{m}mlp.", f"{w}dense.")
            continue
        add(m + moe_norm, f"{w}mlp_norm")
        add(f"{m}mlp.router.weight", f"{w}router")
        experts = [f"{w}experts.{expert}." for expert in range(a.num_experts)]
        both = (expert + name for expert in experts for name in ("gate", "up"))
        add(f"{m}{EXPERTS}linear_fc1.weight", *both, kind="experts")
        add(f"{m}{EXPERTS}linear_fc2.weight", *(e + "down" for e in experts), kind="experts")
        if a.shared_hidden:
            add_mlp(f"{m}mlp.shared_experts.", f"{w}shared.")
        if a.shared_gate:
            add(f"{m}mlp.shared_experts.gate_weight", f"{w}shared_gate")
    add("decoder.final_layernorm.weight", "final_norm")
    if not a.tied:
        add("output_layer.weight", "output")
    return found


class MegatronWeights:
    """The weights of a model in a checkpoint, each cut out when it is asked for.

    Raises:
        ValueError: the checkpoint holds other tensors than the model has.
    """

    def __init__(self, checkpoint: MegatronCheckpoint, architecture: Architecture) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._shapes = weight_shapes(architecture)
        tensors = joined(architecture, moe_norm=norm_place(checkpoint, architecture))
        _check_tensors(checkpoint, {name: tensor.shape for name, tensor in tensors.items()})
        self._held = {w: (name, tensor) for name, tensor in tensors.items() for w in tensor.weights}

    def read(self, weight: str) -> Tensor:
        """A weight, by its name in `weight_shapes`."""
        name, tensor = self._held[weight]
        shape, index = self._shapes[weight], tensor.weights.index(weight)
        if tensor.kind == "groups":
            return _out_of_groups(self._checkpoint.read(name), self._architecture)[index]
        if tensor.kind == "rows":
            start = sum(self._shapes[before][0] for before in tensor.weights[:index])
            return self._checkpoint.read_box(name, (start, *(0 for _ in shape[1:])), shape)
        expert, part = divmod(index, len(tensor.weights) // tensor.shape[0])
        offset = (expert, part * shape[0], 0)
        return self._checkpoint.read_box(name, offset, (1, *shape)).squeeze(0)


def norm_place(checkpoint: MegatronCheckpoint, architecture: Architecture) -> NormPlace:
    """Where this checkpoint keeps the norm of sparse layers."""
    name = f"decoder.layers.{architecture.moe_layers[0]}.{OWN_NORM}"
    return OWN_NORM if name in checkpoint.names else FUSED_NORM


def megatron_weights(
    architecture: Architecture, read: Callable[[str], Tensor], *, dtype: torch.dtype, moe_norm: NormPlace
) -> dict[str, LazyWeight]:
    """The tensors of a model's Megatron checkpoint, each made while it is written.

    Args:
        architecture: the model.
        read: gives a weight by its name in `weight_shapes`, in this dtype.
        dtype: of all of them.
        moe_norm: where the norm of sparse layers lies.
    """
    return {
        name: LazyWeight(shape=tensor.shape, dtype=dtype, rows=_rows(tensor, architecture, read))
        for name, tensor in joined(architecture, moe_norm=moe_norm).items()
    }


def _rows(tensor: Joined, architecture: Architecture, read: Callable[[str], Tensor]) -> Callable[[int, int], Tensor]:
    def rows(start: int, stop: int) -> Tensor:
        if tensor.kind == "groups":
            return _into_groups([read(w) for w in tensor.weights], architecture)[start:stop]
        if tensor.kind == "rows":
            return torch.cat([read(weight) for weight in tensor.weights])[start:stop]
        parts = len(tensor.weights) // tensor.shape[0]
        experts = (tensor.weights[e * parts : (e + 1) * parts] for e in range(start, stop))
        return torch.stack([torch.cat([read(w) for w in expert]) for expert in experts])

    return rows


def _into_groups(qkv: list[Tensor], architecture: Architecture) -> Tensor:
    """q, k and v, [heads * head_dim, ...], as Megatron joins them: for each query group its q heads, its k, its v."""
    groups = architecture.num_kv_heads
    cut = [t.reshape(groups, -1, architecture.head_dim, *t.shape[1:]) for t in qkv]
    return torch.cat(cut, dim=1).reshape(-1, *qkv[0].shape[1:])


def _out_of_groups(joined_qkv: Tensor, architecture: Architecture) -> list[Tensor]:
    """The inverse of `_into_groups`."""
    a = architecture
    rest = joined_qkv.shape[1:]
    heads = joined_qkv.reshape(a.num_kv_heads, -1, a.head_dim, *rest)
    parts = heads.split([a.num_heads // a.num_kv_heads, 1, 1], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


def _check_tensors(checkpoint: MegatronCheckpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    stored = {name: info.shape for name, info in checkpoint.names.items()}
    problems = [
        f"{len(names)} tensors {what}, {min(names)} among them"
        for what, names in (
            ("are missing", wanted.keys() - stored.keys()),
            ("have no place in the model", stored.keys() - wanted.keys()),
        )
        if names
    ]
    problems += [
        f"{name} must have the shape {list(wanted[name])}; got {list(shape)}"
        for name, shape in stored.items()
        if name in wanted and shape != wanted[name]
    ][:3]
    if problems:
        raise ValueError(f"{checkpoint.path} is not what its flags say: {'; '.join(problems)}")
