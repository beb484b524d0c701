"""The command merge: put the trained experts of modules back into their parent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from emo_megatron.checkpoint.edit import OWNER, PARENT, REFUSE, CheckpointEdit, Policies, open_modules, open_parent
from emo_megatron.commands.options import unset
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put the trained experts of modules back into the parent checkpoint.

    For example:
        emo_megatron merge --parent runs/emo --modules runs/perl --output runs/emo-perl
    """

    parent: Path
    """Megatron checkpoint that the modules were extracted from."""
    modules: tuple[Path, ...]
    """Checkpoints of the modules. If several modules changed the same expert, --conflict decides."""
    output: Path
    """Checkpoint folder to write, for Megatron's --load; must not exist. The folder also gets report.json."""
    selections: Annotated[tuple[Path, ...], unset("PATH ...", "selection.json in each module")] = ()
    """Selection file of each module, in the order of --modules."""
    weights: Literal["experts", "experts+router", "all"] = "experts"
    """Weights to take from the modules; all means every weight, and allows one module only."""
    blend: float = 1.0
    """Weight of the module in the average of parent and module, in (0, 1]; 1 takes the values of the module."""
    conflict: str = REFUSE
    """What to do if several modules changed one expert: refuse, parent, average, or the folder name of a module."""


def run(options: Options) -> Path:
    """Write the parent with the experts of the modules at their old indices, and a report of the merged weights."""
    must_not_exist(options.output)
    if not options.modules:
        raise ValueError("--modules must name at least one module")
    modules = open_modules(options.modules, options.selections)
    if options.weights == "all" and len(modules) > 1:
        raise ValueError(
            "--weights all takes the shared weights too, so --modules must name one module; for several modules, use "
            "compose --shared"
        )
    policies = Policies(
        shared=modules[0].name if options.weights == "all" else PARENT,
        router=PARENT if options.weights == "experts" else OWNER,
        conflict=options.conflict,
        blend=options.blend,
    )
    parent = open_parent(options.parent, modules[0].selection)
    return CheckpointEdit(parent=parent, modules=modules, policies=policies).write(options.output)
