"""Put modules back into their parent, or together into one model.

python -m emo_megatron merge --parent runs/emo --modules runs/perl --output runs/emo_perl
python -m emo_megatron compose --modules runs/perl runs/french --parent runs/emo --output runs/both
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from emo_megatron.checkpoint.edit import Assembly, Policies
from emo_megatron.checkpoint.metadata import facts_of
from emo_megatron.checkpoint.parts import SELECTION_FILE, Module, check_target, open_module, open_parent
from emo_megatron.experts.compose import OWNER, PARENT, POLICIES, REFUSE, Rule, compose_selections
from emo_megatron.experts.select import parse_keep
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts, load_stats
from emo_megatron.files import must_not_exist

Weights = Literal["experts", "experts+router", "all"]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Put a module's trained experts back into its parent, in the places they came from."""

    parent: Path
    """The checkpoint the modules were cut from."""
    modules: tuple[Path, ...]
    """Modules' checkpoints; several must agree about experts that they share, or see --conflict."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist. It also gets report.json."""
    selections: tuple[Path, ...] = ()
    """The Selection each module was cut with, in order; by default selection.json in its folder."""
    weights: Weights = "experts"
    """What is taken from the modules: their experts; also the experts' rows of the router; or everything they hold
    (one module only)."""
    blend: float = 1.0
    """How far to go from the parent's values to the modules', in (0, 1]."""
    conflict: str = REFUSE
    """Whose expert to take where modules changed it differently: parent, average, or a module by its folder's name."""


@dataclass(frozen=True, kw_only=True)
class ComposeOptions:
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


def merge(options: MergeOptions) -> Path:
    """Write the parent with the modules' experts in their old places, and a report of what was taken.

    Raises:
        ValueError: the parts do not fit together, modules disagree, or the output exists.
    """
    must_not_exist(options.output)
    if not options.modules:
        raise ValueError("--modules must name at least one module")
    modules = _open(options.modules, options.selections)
    if options.weights == "all" and len(modules) > 1:
        raise ValueError(
            "--weights all takes the shared weights of a module, and there are several: use compose --shared"
        )
    parent = open_parent(options.parent, modules[0].selection)
    policies = Policies(
        shared=modules[0].name if options.weights == "all" else PARENT,
        router=PARENT if options.weights == "experts" else OWNER,
        conflict=options.conflict,
        blend=options.blend,
    )
    assembly = Assembly(parent=parent, modules=modules, target=None, policies=policies)
    return assembly.write(options.output, notes={})


def compose(options: ComposeOptions) -> Path:
    """Write the composed Selection, or the composed model with its Selection and report.

    Raises:
        ValueError: the parts do not fit together, modules disagree, or the output exists.
    """
    must_not_exist(options.output)
    modules = _open(options.modules, options.selections) if options.modules else []
    selections = [m.selection for m in modules] or [load_selection(s) for s in options.selections]
    stats = _stats(options.stats, selections=selections)
    keep = None
    if options.keep is not None:
        keep = parse_keep(options.keep, _facts(modules, stats=stats))
    composed = compose_selections(
        selections, keep=keep, scores=[measured.mean_probability_LE for measured in stats], rule=options.rule
    )
    if not modules:
        return composed.save(options.output)
    parent = None if options.parent is None else open_parent(options.parent, composed)
    assembly = Assembly(
        parent=parent,
        modules=modules,
        target=composed,
        policies=Policies(shared=options.shared, router=options.router, conflict=options.conflict),
    )
    check_target(composed, assembly.model.args)
    return assembly.write(options.output, notes={SELECTION_FILE: composed.save})


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
    if paths and len(paths) != len(selections):
        raise ValueError(f"--stats must name one file for each selection: {len(paths)} for {len(selections)}")
    found = [load_stats(path) for path in paths]
    for stats, selection in zip(found, selections, strict=False):
        facts = stats.model
        selection.check_model(facts.fingerprint, num_experts=facts.num_experts, layers=facts.layers)
    return found


def _open(paths: Sequence[Path], selections: Sequence[Path]) -> list[Module]:
    if selections and len(selections) != len(paths):
        raise ValueError(f"--selections must name one file for each module: {len(selections)} for {len(paths)}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        # policies and the report name modules, so each needs a name of its own
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"--modules must be different folders; got {', '.join(names)}")
    for name in names:
        if name in POLICIES:
            raise ValueError(
                f"--modules names a folder {name}, and a module goes by its folder's name where {name} is a policy: "
                "rename the folder"
            )
    return [
        open_module(path, name=name, selection=selections[i] if selections else None)
        for i, (path, name) in enumerate(zip(paths, names, strict=True))
    ]


Options, run = MergeOptions, merge
