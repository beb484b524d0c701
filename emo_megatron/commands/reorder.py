"""The command reorder: put the experts of a checkpoint in the order of a placement. The model stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.edit import CheckpointEdit, open_parent
from emo_megatron.checkpoint.source import check_placement
from emo_megatron.experts.placement import load_placement
from emo_megatron.files import must_not_exist

PLACEMENT_FILE = "placement.json"
"""File name of the placement in the folder of a reordered checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the experts of a Megatron checkpoint in the order of a placement. The model computes the same.

    Each expert-parallel rank holds a contiguous range of experts, so the new order decides which experts share a rank.

    For example:
        emo_megatron reorder --checkpoint runs/emo --placement ep8.json --output runs/emo-ep8
    """

    checkpoint: Path
    """Megatron checkpoint: the folder of --save, or one iteration in the folder."""
    placement: Path
    """Placement file, written by place from statistics of this checkpoint."""
    output: Path
    """Checkpoint folder to write, for Megatron's --load; must not exist. A copy of the placement is stored in it."""


def run(options: Options) -> Path:
    """Write the reordered checkpoint: weights only, without optimizer state, at iteration 0."""
    must_not_exist(options.output)
    placement = load_placement(options.placement)
    parent = open_parent(options.checkpoint)
    check_placement(parent, placement=placement)
    edit = CheckpointEdit(parent=parent, experts=placement.by_layer)
    return edit.write(options.output, notes={PLACEMENT_FILE: placement.save})
