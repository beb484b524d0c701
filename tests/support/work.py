"""What a piece of code costs, counted and not timed: operations, bytes, the largest tensor, lines of the package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGE = str(Path(__file__).resolve().parents[2] / "emo_megatron")


@dataclass(frozen=True)
class Work:
    """Of one call, in forward and in the backward passes it runs."""

    operations: int
    """Of torch, collectives among them."""
    num_bytes: int
    """Of all tensors that operations gave and that are no views, freed or not."""
    largest: int
    """Elements of the largest of them."""
    lines: int
    """Of the package's Python, each as often as it ran."""


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.num_bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [t for t in _tensors(result) if t.untyped_storage()._cdata not in given]
        self.operations += 1
        self.num_bytes += sum(t.untyped_storage().nbytes() for t in made)
        self.largest = max([self.largest, *(t.numel() for t in made)])
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def measured(call: Callable[[], Any]) -> tuple[Any, Work]:
    """What the call returns, and its work."""
    lines = 0

    def in_package(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return in_package

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return in_package if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    counted = _Counted()
    sys.settrace(trace)
    try:
        with counted:
            result = call()
    finally:
        sys.settrace(before)
    return result, Work(counted.operations, counted.num_bytes, counted.largest, lines)
