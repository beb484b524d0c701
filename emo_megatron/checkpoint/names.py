"""One set of names for the weights of a model, and the places of these weights in Megatron's checkpoint formats.

Every layer has its own names (`decoder.layers.3.mlp.router.weight`, from 0); experts are on the first axis. By default
Megatron stacks equal layers in one tensor ([L, ...], `decoder.layers.mlp.router.weight`). Megatron can also store every
expert separately (`mlp.experts.experts.5.`), with separate halves of a gated projection (`weight_w`, `weight_v`).

A layer of multi-token prediction is a transformer layer and the weights around it: `mtp.layers.0.eh_proj.weight`,
`mtp.layers.0.transformer_layer.mlp.router.weight`. The number of the transformer layer is the number of the decoder's
layers plus the depth of the prediction, from 1. Megatron never stacks these layers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

EXPERTS = "mlp.experts.experts."
"""Start, after the layer, of the name of every expert weight; the routed experts are on the first axis."""
ROUTER = "mlp.router."
"""Start, after the layer, of the name of the router's tensors, [E, ...]."""

PREDICTION = "mtp."
"""Start of the names of all weights of multi-token prediction."""

_LAYER = re.compile(
    r"(?:decoder\.layers\.(?:(?P<layer>\d+)\.)?"
    # mtp_model_layer is the name of the module, and the stored name in hybrid models, where it is a stack of layers
    r"|mtp\.layers\.(?P<depth_idx>\d+)\.(?:transformer_layer|mtp_model_layer)\.(?:layers\.\d+\.)?)"
    r"(?P<rest>.+)"
)
_EXPERT = re.compile(rf"{re.escape(EXPERTS)}(?P<expert>\d+)\.(?P<rest>.+)")
_HALF = re.compile(r"(?P<name>.+\.linear_fc1\.(?:weight|bias))_(?P<half>[wv])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stored tensor, or one layer of it, and the box (`offset`, `shape`) of a weight with the same values."""

    stored: str
    lead: tuple[int, ...]
    """Index of the piece in the first axes of the stored tensor that the weight lacks: the layer, or nothing."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    extra: int
    """Number of first axes of the weight that the stored tensor lacks."""


def pieces_of(stored: Mapping[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    """The name of every weight -> the pieces that fill the weight."""
    found: dict[str, list[Piece]] = {}
    for stored_name, size in stored.items():
        match = _LAYER.fullmatch(stored_name)
        if match is None:
            whole = Piece(stored=stored_name, lead=(), offset=(0,) * len(size), shape=size, extra=0)
            found[stored_name] = [whole]
            continue
        is_stacked = match["layer"] is None and match["depth_idx"] is None
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
        piece = functools.partial(Piece, stored=stored_name, offset=tuple(offset), shape=shape, extra=extra)
        if is_stacked:
            for layer in range(size[0]):
                found.setdefault(f"decoder.layers.{layer}.{rest}", []).append(piece(lead=(layer,)))
        else:
            found.setdefault(stored_name[: match.start("rest")] + rest, []).append(piece(lead=()))
    return found


def in_order(name: str) -> tuple[int, int, str]:
    """Sort key of a name: first the embedding, then the layers by number, then the rest."""
    match = _LAYER.fullmatch(name)
    if match and match["depth_idx"] is None:
        return 1, int(match["layer"] or 0), match["rest"]
    return (0 if name.startswith("embedding.") else 2), 0, name


def count_layers(names: Iterable[str]) -> int:
    """Number of layers of the decoder, from the names of all weights of a model."""
    return max((split_name(name, num_layers=0)[0] for name in names if not name.startswith(PREDICTION)), default=0)


def split_name(name: str, *, num_layers: int) -> tuple[int, str]:
    """The layer of a weight, from 1, and the rest of the name; outside the layers 0 and the whole name.

    Layers of multi-token prediction follow the `num_layers` layers of the decoder.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return 0, name
    if match["depth_idx"] is not None:
        return num_layers + int(match["depth_idx"]) + 1, match["rest"]
    return int(match["layer"] or 0) + 1, match["rest"]


def is_of_experts(name: str) -> bool:
    """Whether the first axis of a weight is the routed experts."""
    return split_name(name, num_layers=0)[1].startswith((EXPERTS, ROUTER))
