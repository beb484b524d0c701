"""The weights of a model in a Megatron checkpoint, by the table of mapping.py: read one by one, joined as written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight
from emo_megatron.hf.architecture import Architecture
from emo_megatron.hf.mapping import (
    FUSED_NORM,
    OWN_NORM,
    Joined,
    NormPlace,
    into_groups,
    out_of_groups,
    shape_problems,
    tensors_of,
)


class MegatronWeights:
    """The weights of a model in a checkpoint; ValueError where the checkpoint holds other tensors than the model."""

    def __init__(self, checkpoint: MegatronCheckpoint, architecture: Architecture) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        has_own_norm = f"decoder.layers.{architecture.moe_layers[0]}.{OWN_NORM}" in checkpoint.names
        tensors = _tensors(architecture, OWN_NORM if has_own_norm else FUSED_NORM)
        stored = {name: info.shape for name, info in checkpoint.names.items()}
        if problems := shape_problems(stored, {tensor.name: tensor.shape for tensor in tensors}):
            raise ValueError(f"{checkpoint.path} is not what its flags say: {'; '.join(problems)}")
        self._held = {weight: tensor for tensor in tensors for weight in tensor.weights}

    def read(self, weight: str) -> Tensor:
        """A weight by its name in `weight_shapes`, cut out of its tensor."""
        tensor = self._held[weight]
        names, shape = list(tensor.weights), tensor.weights[weight]
        place = names.index(weight)
        if tensor.row.kind == "qkv":
            return out_of_groups(self._checkpoint.read(tensor.name), self._architecture)[place]
        num_parts = len(tensor.row.weights)
        expert, part = divmod(place, num_parts)
        start = sum(tensor.weights[before][0] for before in names[place - part : place])
        offset, box = (start, *(0 for _ in shape[1:])), shape
        if tensor.row.is_of_experts:
            offset, box = (expert, *offset), (1, *box)
        return self._checkpoint.read_box(tensor.name, offset, box).reshape(shape)


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
        tensor.name: LazyWeight(shape=tensor.shape, dtype=dtype, rows=_rows(tensor, architecture, read))
        for tensor in _tensors(architecture, moe_norm)
    }


def _tensors(architecture: Architecture, moe_norm: NormPlace) -> list[Joined]:
    return [tensor for tensor in tensors_of(architecture, moe_norm=moe_norm) if not tensor.is_constant]


def _rows(tensor: Joined, architecture: Architecture, read: Callable[[str], Tensor]) -> Callable[[int, int], Tensor]:
    names, num_parts = list(tensor.weights), len(tensor.row.weights)

    def rows(start: int, stop: int) -> Tensor:
        if tensor.row.is_of_experts:
            experts = (names[e * num_parts : (e + 1) * num_parts] for e in range(start, stop))
            return torch.stack([torch.cat([read(name) for name in expert]) for expert in experts])
        parts = [read(name) for name in names]
        joined = into_groups(parts, architecture) if tensor.row.kind == "qkv" else torch.cat(parts)
        return joined[start:stop]

    return rows
