"""Cut a module out of a Megatron checkpoint: the same model with fewer experts, for stock Megatron to load.

python -m emo_megatron extract --checkpoint runs/emo --selection french.json --output runs/french
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.edit import Assembly, Policies
from emo_megatron.checkpoint.parts import SELECTION_FILE, check_target, open_parent
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Cut a module out of a Megatron checkpoint; the result trains, resumes and evaluates in stock Megatron."""

    checkpoint: Path
    """What --save named in training, or one iteration's folder in it."""
    selection: Path
    """The experts to keep: a file of `select` or `compose`."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets the Selection."""


def extract(options: ExtractOptions) -> Path:
    """Write the module's checkpoint: weights only, a fresh optimizer, iteration 0.

    Returns:
        The folder.

    Raises:
        ValueError: the Selection is of another model or cannot be a Megatron model; the checkpoint is damaged; the
            output exists.
    """
    must_not_exist(options.output)
    selection = load_selection(options.selection)
    parent = open_parent(options.checkpoint, selection)
    check_target(selection, parent.args)
    assembly = Assembly(parent=parent, modules=[], target=selection, policies=Policies())
    return assembly.write(options.output, notes={SELECTION_FILE: selection.save})


Options, run = ExtractOptions, extract
