"""Put modules of one parent together into one model, or their Selections into one.

python -m emo_megatron compose --modules runs/perl runs/french --parent runs/emo --output runs/both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from emo_megatron.checkpoint.reader import facts_of
from emo_megatron.experts.compose import Rule, compose_selections
from emo_megatron.experts.select import parse_keep
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts, load_stats
from emo_megatron.files import must_not_exist


@dataclass(frozen=True, kw_only=True)
class Options:
    """Put modules of one parent together: their Selections into one, or their checkpoints into a model."""

    output: Path
    """Selection file to write; with --modules the folder of a checkpoint. Must not exist."""
    selections: tuple[Path, ...] = ()
    """Selections to compose; with --modules the one each was cut with, by default selection.json in its folder."""
    stats: tuple[Path, ...] = ()
    """Statistics of each selection's data, in order: their mean router probabilities decide which experts of a union
    that is too large stay, and which fill one that is too small."""
    keep: str | None = None
    """Experts a layer as `select` counts them, the shared ones included: 16; or a share of the parent's: 12.5%. By
    default as many as the largest union needs."""
    rule: Rule = "union"
    """union: experts of the Selections first; score: the best by the added scores."""
    modules: tuple[Path, ...] = ()
    """Checkpoints of modules, perhaps trained apart: write a checkpoint of the composition."""
    parent: Path | None = None
    """The checkpoint they were cut from: needed where a policy is "parent", and for experts that none of them has."""
    shared: str = PARENT
    """Whose weights that are no expert's: parent, average (of the modules that changed them), or a module by its
    folder's name."""
    router: str = OWNER
    """Whose row of the router an expert gets: owner (as the expert), parent, average, or a module's name."""
    conflict: str = REFUSE
    """Whose expert to take where modules changed it differently: parent, average, or a module's name."""


def run(options: Options) -> Path:
    """Write the composed Selection, or the composed model with its Selection and report."""
    must_not_exist(options.output)
    modules = open_modules(options.modules, options.selections) if options.modules else []
    selections = [m.selection for m in modules] or [load_selection(s) for s in options.selections]
    stats = _stats(options.stats, selections=selections)
    composed = compose_selections(
        selections,
        keep=None if options.keep is None else parse_keep(options.keep, _facts(modules, stats=stats)),
        scores=[measured.mean_probability_LE for measured in stats],
        rule=options.rule,
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


def _facts(modules: Sequence[Module], *, stats: Sequence[ExpertStatistics]) -> ModelFacts:
    """Of the parent: which experts are shared is known from statistics and from checkpoints, not from Selections."""
    if stats:
        return stats[0].model
    if not modules:
        raise ValueError(
            "--keep counts the shared experts, which Selections do not list: give --stats, one file for each selection"
        )
    first = modules[0]
    return replace(facts_of(first.checkpoint), num_experts=first.selection.num_experts)


def _stats(paths: Sequence[Path], *, selections: Sequence[Selection]) -> list[ExpertStatistics]:
    """Statistics of the files, each of the model that its Selection is of."""
    found = [load_stats(path) for path in paths]
    for stats, selection in zip(found, selections, strict=False):
        facts = stats.model
        selection.check_model(facts.fingerprint, num_experts=facts.num_experts, layers=facts.layers)
    return found
