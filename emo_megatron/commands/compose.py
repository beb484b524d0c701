"""The command compose: combine modules of one parent into one model, or their Selections into one Selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from emo_megatron.checkpoint.edit import (
    OWNER,
    PARENT,
    REFUSE,
    SELECTION_FILE,
    CheckpointEdit,
    Module,
    Policies,
    open_modules,
    open_parent,
)
from emo_megatron.checkpoint.reader import metadata_of
from emo_megatron.commands.options import unset
from emo_megatron.experts.compose import Rule, compose_selections
from emo_megatron.experts.select import parse_keep, parse_size
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.experts.stats import ExpertStatistics, load_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Combine modules of one parent: their Selections into one Selection, or their checkpoints into one model.

    Combine two Selections:
        emo_megatron compose --selections perl.json french.json --output both.json

    Combine the checkpoints of two modules that were trained separately:
        emo_megatron compose --modules runs/perl runs/french --parent runs/emo --output runs/both
    """

    output: Path
    """Selection file to write, or with --modules the checkpoint folder; must not exist."""
    selections: Annotated[tuple[Path, ...], unset("PATH ...", "with --modules, selection.json in each module")] = ()
    """Selection files to combine; with --modules, the Selection of each module."""
    stats: Annotated[tuple[Path, ...], unset("PATH ...", "none")] = ()
    """Statistics file per Selection. The mean router probability decides which experts reach the size of --keep."""
    keep: Annotated[str | None, unset("SIZE", "the largest union of a layer")] = None
    """Routed experts per layer: a share such as 25%, or a number such as "8 routed"."""
    rule: Rule = "union"
    """union: experts of the Selections come first. score: the experts with the best sum of scores."""
    modules: Annotated[tuple[Path, ...], unset("PATH ...", "none: combine Selections only")] = ()
    """Megatron checkpoints of modules."""
    parent: Annotated[Path | None, unset("PATH", "none")] = None
    """Megatron checkpoint of the parent. Needed if a policy is parent, and for experts that no module has."""
    shared: str = PARENT
    """Source of the weights that belong to no expert: parent, average, or the folder name of a module."""
    router: str = OWNER
    """Source of the router row of an expert: owner (of the expert), parent, average, or the folder name of a module."""
    conflict: str = REFUSE
    """What to do if several modules changed one expert: refuse, parent, average, or the folder name of a module."""


def run(options: Options) -> Path:
    """Write the combined Selection, or the combined model with its Selection and report."""
    must_not_exist(options.output)
    modules = open_modules(options.modules, options.selections) if options.modules else []
    selections = [m.selection for m in modules] or [load_selection(s) for s in options.selections]
    stats = _stats(options.stats, selections=selections)
    keep = None
    if options.keep is not None and selections:
        keep = _keep(options.keep, selections[0].num_experts, modules, stats=stats)
    composed = compose_selections(
        selections, keep=keep, scores=[measured.mean_probability_LE for measured in stats], rule=options.rule
    )
    if not modules:
        return composed.save(options.output)
    edit = CheckpointEdit(
        parent=None if options.parent is None else open_parent(options.parent, composed),
        experts=composed.by_layer,
        modules=modules,
        policies=Policies(shared=options.shared, router=options.router, conflict=options.conflict),
    )
    return edit.write(options.output, notes={SELECTION_FILE: composed.save})


def _keep(text: str, num_experts: int, modules: Sequence[Module], *, stats: Sequence[ExpertStatistics]) -> int:
    """Routed experts per layer. Selections do not store the top-k of the model: without statistics and modules,
    extract checks the lower bound."""
    if not stats and not modules:
        return parse_size(text, num_experts=num_experts)
    model = stats[0].model if stats else metadata_of(modules[0].checkpoint)
    return parse_keep(text, num_experts=num_experts, top_k=model.top_k)


def _stats(paths: Sequence[Path], *, selections: Sequence[Selection]) -> list[ExpertStatistics]:
    """Load the statistics; each must be of the model of its Selection."""
    found = [load_stats(path) for path in paths]
    for stats, selection in zip(found, selections, strict=False):
        metadata = stats.model
        selection.check_model(metadata.fingerprint, num_experts=metadata.num_experts, layers=metadata.layers)
    return found
