"""Put modules back into their parent.

python -m emo_megatron merge --parent runs/emo --modules runs/perl --output runs/emo_perl
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emo_megatron.checkpoint.edit import OWNER, PARENT, REFUSE, CheckpointEdit, Policies, open_modules, open_parent
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put a module's trained experts back into its parent, in the places they came from."""

    parent: Path
    """The checkpoint the modules were cut from."""
    modules: tuple[Path, ...]
    """Modules' checkpoints; several must agree about experts that they share, or see --conflict."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets report.json."""
    selections: tuple[Path, ...] = ()
    """The Selection each module was cut with, in order; by default selection.json in its folder."""
    weights: Literal["experts", "experts+router", "all"] = "experts"
    """What is taken from the modules: their experts; also the experts' rows of the router; or everything they hold
    (one module only)."""
    blend: float = 1.0
    """How far to go from the parent's values to the modules', in (0, 1]."""
    conflict: str = REFUSE
    """Whose expert to take where modules changed it differently: parent, average, or a module by its folder's name."""


def run(options: Options) -> Path:
    """Write the parent with the modules' experts in their old places, and a report of what was taken."""
    must_not_exist(options.output)
    if not options.modules:
        raise ValueError("--modules must name at least one module")
    modules = open_modules(options.modules, options.selections)
    if options.weights == "all" and len(modules) > 1:
        raise ValueError(
            "--weights all takes the shared weights of a module, and there are several: use compose --shared"
        )
    policies = Policies(
        shared=modules[0].name if options.weights == "all" else PARENT,
        router=PARENT if options.weights == "experts" else OWNER,
        conflict=options.conflict,
        blend=options.blend,
    )
    parent = open_parent(options.parent, modules[0].selection)
    return CheckpointEdit(parent=parent, modules=modules, policies=policies).write(options.output)
