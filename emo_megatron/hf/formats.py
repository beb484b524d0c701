"""What a Hugging Face format is: its config.json, its tensors, and what it cannot express."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emo_megatron.finite import check_named_weight, first_bad
from emo_megatron.hf.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a format."""

    name: str
    shape: tuple[int, ...]
    weight: str | None
    """The weight that it holds, by its name in `mapping.weight_shapes`; None for a constant."""
    value: float = 0.0
    """What a constant is filled with."""
    scale: float = 1.0
    """A power of two that the weight is multiplied by, so that undoing it is exact."""
    padding_rows: int = 0
    """Rows of zeros after the weight's own."""


IsConstant = Callable[[str, set[float]], bool]
"""Whether every tensor of a folder whose name has a part is filled with one and the same of some values."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format, both ways."""

    model_type: str
    """Its name in config.json."""
    problems: Callable[[Architecture], list[str]]
    """What it cannot express of an architecture, one sentence each."""
    config: Callable[[Architecture], dict[str, Any]]
    """What config.json says of an architecture; token ids and dtype are the caller's."""
    entries: Callable[..., list[Entry]]
    """Its tensors, in the order of the model; `shared_gate_value` fills a shared gate that the model lacks."""
    architecture: Callable[[Mapping[str, Any], IsConstant], Architecture]
    """What a folder with this config.json holds; ValueError for what no `Architecture` expresses."""


def to_file(entry: Entry, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> Tensor:
    """The tensor of the format, of the weight that `read` gives; ValueError where it is not finite in this dtype."""
    if entry.weight is None:
        return torch.full(entry.shape, entry.value, dtype=dtype)
    weight = read(entry.weight)
    check_named_weight(entry.weight, weight, said=entry.name)
    tensor = weight.to(dtype)
    if entry.scale != 1.0:
        tensor = tensor * entry.scale
    if entry.padding_rows:
        tensor = torch.cat([tensor, tensor.new_zeros(entry.padding_rows, *tensor.shape[1:])])
    assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    can_overflow = tensor.dtype != weight.dtype or entry.scale != 1.0
    if can_overflow and first_bad(tensor) is not None:
        raise ValueError(
            f"{entry.name} does not fit {dtype}: its largest value is {float(weight.abs().max()):g}; "
            "export with --dtype float32"
        )
    return tensor.contiguous()


def from_file(entry: Entry, tensor: Tensor) -> Tensor:
    """The weight that a tensor of the format holds, which must be finite; the inverse of `to_file`."""
    if entry.padding_rows:
        tensor = tensor[: -entry.padding_rows]
    if entry.weight is not None:
        check_named_weight(entry.weight, tensor, said=entry.name)
    return tensor if entry.scale == 1.0 else tensor / entry.scale
