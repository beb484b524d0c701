"""The command extract: write a Megatron checkpoint with the selected experts only, which stock Megatron loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.edit import SELECTION_FILE, CheckpointEdit, open_parent
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Extract a module: write a Megatron checkpoint that keeps only the selected experts.

    Stock Megatron trains, resumes and evaluates the module.

    For example:
        emo_megatron extract --checkpoint runs/emo --selection french.json --output runs/french
    """

    checkpoint: Path
    """Megatron checkpoint: the folder of --save, or one iteration in the folder."""
    selection: Path
    """Selection file with the experts to keep, written by select or compose."""
    output: Path
    """Checkpoint folder to write, for Megatron's --load; must not exist. A copy of the Selection is stored in it."""


def run(options: Options) -> Path:
    """Write the checkpoint of the module: weights only, without optimizer state, at iteration 0."""
    must_not_exist(options.output)
    selection = load_selection(options.selection)
    parent = open_parent(options.checkpoint, selection, file=options.selection)
    edit = CheckpointEdit(parent=parent, experts=selection.by_layer)
    return edit.write(options.output, notes={SELECTION_FILE: selection.save})
