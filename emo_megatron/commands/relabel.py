"""Give a checkpoint's experts the order of a placement: the same model, its experts under other numbers.

python -m emo_megatron relabel --checkpoint runs/emo --placement ep8.json --output runs/emo-ep8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.edit import CheckpointEdit, open_parent
from emo_megatron.checkpoint.source import check_placement
from emo_megatron.experts.placement import load_placement
from emo_megatron.files import must_not_exist

PLACEMENT_FILE = "placement.json"
"""In the folder of a relabelled checkpoint: the placement."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put a Megatron checkpoint's experts in the order of a placement; every dispatcher then finds them there."""

    checkpoint: Path
    """What --save named in training, or one iteration's folder in it."""
    placement: Path
    """A file of `place`, made from statistics of this checkpoint."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets the placement."""


def run(options: Options) -> Path:
    """Write the relabelled checkpoint: weights only, a fresh optimizer, iteration 0."""
    must_not_exist(options.output)
    placement = load_placement(options.placement)
    parent = open_parent(options.checkpoint)
    check_placement(parent, placement=placement)
    edit = CheckpointEdit(parent=parent, experts=placement.by_layer)
    return edit.write(options.output, notes={PLACEMENT_FILE: placement.save})
