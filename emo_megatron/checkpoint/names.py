"""One set of names for a model's weights, and where Megatron's checkpoint formats keep each.

Layers apart (`decoder.layers.3.mlp.router.weight`, from 0), experts on the first axis. Megatron stacks equal layers in
one tensor ([L, ...], `decoder.layers.mlp.router.weight`) unless told otherwise, and can store every expert alone
(`mlp.experts.experts.5.`) with the halves of a gated projection apart (`weight_w`, `weight_v`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

EXPERTS = "mlp.experts.experts."
"""Begins, after the layer, the name of every tensor that has the routed experts on its first axis."""
ROUTER = "mlp.router."
"""Begins, after the layer, the name of the router's tensors, [E, ...]."""

_LAYER = re.compile(r"decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>.+)")
_EXPERT = re.compile(rf"{re.escape(EXPERTS)}(?P<expert>\d+)\.(?P<rest>.+)")
_HALF = re.compile(r"(?P<name>.+\.linear_fc1\.(?:weight|bias))_(?P<half>[wv])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stored tensor, or one layer of it, that fills a box of a weight."""

    stored: str
    lead: tuple[int, ...]
    """Where it begins in the stored tensor's first axes, which the weight lacks."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    extra: int
    """First axes of the weight that the stored tensor lacks."""


def pieces_of(stored: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """Every weight's name and the stored boxes that fill it."""
    found: dict[str, list[Piece]] = {}
    for stored_name, size in stored.items():
        match = _LAYER.fullmatch(stored_name)
        if match is None:
            whole = Piece(stored=stored_name, lead=(), offset=(0,) * len(size), shape=size, extra=0)
            found[stored_name] = [whole]
            continue
        is_stacked = match["layer"] is None
        shape = size[1:] if is_stacked else size
        rest, offset, extra = match["rest"], [0] * len(shape), 0
        if expert := _EXPERT.fullmatch(rest):
            rest = EXPERTS + expert["rest"]
            shape, offset, extra = (1, *shape), [int(expert["expert"]), *offset], 1
        if half := _HALF.fullmatch(rest):
            rest = half["name"]
            # [gate; up]: the rows of the second half follow those of the first
            axis = 1 if rest.startswith(EXPERTS) else 0
            offset[axis] = shape[axis] if half["half"] == "v" else 0
        for layer in range(size[0]) if is_stacked else [int(match["layer"])]:
            piece = Piece(
                stored=stored_name, lead=(layer,) if is_stacked else (), offset=tuple(offset), shape=shape, extra=extra
            )
            found.setdefault(f"decoder.layers.{layer}.{rest}", []).append(piece)
    return found


def in_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, what follows them."""
    match = _LAYER.fullmatch(name)
    if match:
        return 1, int(match["layer"] or 0), match["rest"]
    return (0 if name.startswith("embedding.") else 2), 0, name


def split_name(name: str) -> tuple[int, str]:
    """The layer of a weight, from 1, and the rest of its name; 0 and all of it outside the layers."""
    match = _LAYER.fullmatch(name)
    return (int(match["layer"] or 0) + 1, match["rest"]) if match else (0, name)


def is_of_experts(name: str) -> bool:
    """Whether a weight has the routed experts on its first axis."""
    return split_name(name)[1].startswith((EXPERTS, ROUTER))


def refuse_prediction(path: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint with layers of multi-token prediction, which commands for trained models do not know."""
    if any(name.startswith("mtp.") for name in names):
        raise ValueError(
            f"{path} has layers of multi-token prediction, which this command does not know: train without "
            "--mtp-num-layers"
        )
