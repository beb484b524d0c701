"""How one tensor of a Hugging Face checkpoint is made of a weight of the model, and the weight made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emo_megatron.finite import check_named_weight, first_bad


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a format.

    Attributes:
        name: in the format.
        shape: in the format.
        weight: the weight it holds (`architecture.weight_shapes`); None for a constant.
        value: what a constant is filled with.
        scale: a power of two that the weight is multiplied by, so that undoing it is exact.
        padding_rows: rows of zeros after the weight's own.
    """

    name: str
    shape: tuple[int, ...]
    weight: str | None
    value: float = 0.0
    scale: float = 1.0
    padding_rows: int = 0

    def __post_init__(self) -> None:
        assert math.frexp(self.scale)[0] == 0.5, "the scale must be a power of two"


def to_file(entry: Entry, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> Tensor:
    """The tensor of the format.

    Args:
        entry: which.
        read: gives a weight of the model.
        dtype: of the result.

    Raises:
        ValueError: the weight is not finite, or scaling or the dtype drives a value out of range.
    """
    if entry.weight is None:
        return torch.full(entry.shape, entry.value, dtype=dtype)
    weight = read(entry.weight)
    check_named_weight(entry.weight, weight, said=entry.name)
    tensor = weight.to(dtype)
    if entry.scale != 1.0:
        tensor = tensor * entry.scale
    if entry.padding_rows:
        padding = tensor.new_zeros(entry.padding_rows, *tensor.shape[1:])
        tensor = torch.cat([tensor, padding])
    assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    can_overflow = tensor.dtype != weight.dtype or entry.scale != 1.0
    if can_overflow and first_bad(tensor) is not None:
        raise ValueError(
            f"{entry.name} does not fit {dtype}: its largest value is {float(weight.abs().max()):g}; "
            "export with --dtype float32"
        )
    return tensor.contiguous()


def from_file(entry: Entry, tensor: Tensor) -> Tensor:
    """The weight that a tensor of the format holds; the inverse of `to_file`.

    Raises:
        ValueError: it is not finite.
    """
    if entry.padding_rows:
        tensor = tensor[: -entry.padding_rows]
    if entry.weight is not None:
        check_named_weight(entry.weight, tensor, said=entry.name)
    return tensor if entry.scale == 1.0 else tensor / entry.scale
