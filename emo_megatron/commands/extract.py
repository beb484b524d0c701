"""Cut a module out of a Megatron checkpoint: the same model with fewer experts, for stock Megatron to load.

python -m emo_megatron extract --checkpoint runs/emo --selection french.json --output runs/french
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.edit import SELECTION_FILE, CheckpointEdit, open_parent
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cut a module out of a Megatron checkpoint; the result trains, resumes and evaluates in stock Megatron."""

    checkpoint: Path
    """What --save named in training, or one iteration's folder in it."""
    selection: Path
    """The experts to keep: a file of `select` or `compose`."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets the Selection."""


def run(options: Options) -> Path:
    """Write the module's checkpoint: weights only, a fresh optimizer, iteration 0."""
    must_not_exist(options.output)
    selection = load_selection(options.selection)
    edit = CheckpointEdit(parent=open_parent(options.checkpoint, selection), experts=selection.by_layer)
    return edit.write(options.output, notes={SELECTION_FILE: selection.save})
