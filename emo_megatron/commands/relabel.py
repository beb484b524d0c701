"""Give a checkpoint's experts the order of a placement: the same model, its experts under other numbers.

python -m emo_megatron relabel --checkpoint runs/emo --placement ep8.json --output runs/emo-ep8
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from emo_megatron.checkpoint.names import is_of_experts, split_name
from emo_megatron.checkpoint.parts import open_parent
from emo_megatron.checkpoint.source import check_placement
from emo_megatron.checkpoint.writer import LazyWeight, write_checkpoint
from emo_megatron.experts.placement import load_placement
from emo_megatron.files import must_not_exist

PLACEMENT_FILE = "placement.json"
"""In the folder of a relabelled checkpoint: the placement."""


@dataclass(frozen=True, kw_only=True)
class RelabelOptions:
    """Put a Megatron checkpoint's experts in the order of a placement; every dispatcher then finds them there."""

    checkpoint: Path
    """What --save named in training, or one iteration's folder in it."""
    placement: Path
    """A file of `place`, made from statistics of this checkpoint."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets the placement."""


def relabel(options: RelabelOptions) -> Path:
    """Write the relabelled checkpoint: weights only, a fresh optimizer, iteration 0.

    Returns:
        The folder.

    Raises:
        ValueError: the placement is of another model, or experts' numbers mean something to this one; the checkpoint
            is damaged; the output exists.
    """
    must_not_exist(options.output)
    placement = load_placement(options.placement)
    parent = open_parent(options.checkpoint, None)
    check_placement(parent, placement=placement)
    order = dict(zip(placement.layers, placement.order, strict=True))

    def rows(name: str, start: int, stop: int) -> Tensor:
        if not is_of_experts(name):
            return parent.read(name, slice(start, stop))
        return parent.read(name, order[split_name(name)[0]][start:stop])

    weights = {
        name: LazyWeight(
            shape=info.shape,
            dtype=info.dtype,
            rows=functools.partial(rows, name),
            experts=order[split_name(name)[0]] if is_of_experts(name) else (),
        )
        for name, info in parent.names.items()
    }
    return write_checkpoint(options.output, weights, args=parent.args, notes={PLACEMENT_FILE: placement.save})


Options, run = RelabelOptions, relabel
