"""From options to a Selection file: read or measure statistics, choose experts, find the smallest module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from emo_megatron.commands.options import MergeStatsOptions, SelectOptions
from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.select import (
    LAYERWISE,
    NEEDS_OUTPUTS,
    RANDOM,
    SCORES,
    MaxRise,
    keep_for_budget,
    parse_keep,
    select_layerwise,
    select_random,
    select_top,
    selection_of,
    smallest_within,
)
from emo_megatron.experts.selection import Selection
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts, load_stats, merge_stats
from emo_megatron.files import must_not_exist
from emo_megatron.runners.base import StudiedModel, collect_stats
from emo_megatron.runners.progress import Progress, Remember, anew


def select(
    options: SelectOptions,
    *,
    model: StudiedModel | None = None,
    documents: Documents | None = None,
    held_out: Documents | None = None,
) -> Selection:
    """Choose experts and write the Selection.

    What takes long is kept beside the output as it comes, so that an interrupted choice goes on where it was.

    Args:
        options: of the command.
        model: the model in `options.checkpoint`; on several ranks all call alike and the first writes.
        documents: what `options.data` names.
        held_out: what `options.held_out` names.

    Raises:
        ValueError: the output exists, the size is impossible, statistics are of another model or lack what the method
            needs, or what is kept beside the output is of another choice.
    """
    if model is None:
        must_not_exist(options.output)
    else:
        model.from_writer(lambda: must_not_exist(options.output))
    stats = merge_stats([load_stats(path) for path in options.stats]) if options.stats else None
    facts = _facts(stats, model)
    keep = _keep(options, facts)
    calibration = _calibration(options, stats=stats, documents=documents, held_out=held_out)
    if model is None:
        choose = _chooser(options, facts, stats=stats)
        return _selected(options, facts, choose=choose, keep=keep, calibration=calibration)
    question = _question(options, model, keep=keep, stats=stats, calibration=calibration, held_out=held_out)
    with Progress(options.output, model=model, question=question) as progress:
        if stats is None and options.method not in (LAYERWISE, RANDOM):
            assert documents is not None
            outputs = options.method in NEEDS_OUTPUTS
            stats = collect_stats(model, documents, output=progress.statistics, outputs=outputs)
        choose = _chooser(options, facts, stats=stats, model=model, documents=documents, remember=progress.remember)
        return _selected(
            options,
            facts,
            choose=choose,
            keep=keep,
            calibration=calibration,
            model=model,
            held_out=held_out,
            remember=progress.remember,
        )


def _selected(
    options: SelectOptions,
    facts: ModelFacts,
    *,
    choose: Callable[[int], Tensor],
    keep: int | None,
    calibration: list[dict[str, Any]],
    model: StudiedModel | None = None,
    held_out: Documents | None = None,
    remember: Remember = anew,
) -> Selection:
    """Choose as many experts as are asked for, or as losses allow, and write the Selection."""
    data: dict[str, Any] = {"calibration": calibration}
    if keep is not None:
        mask_LE = choose(keep)
        data |= {} if options.budget_mb is None else {"budget_mb": options.budget_mb}
    else:
        assert model is not None
        assert held_out is not None
        assert options.max_rise is not None
        bound = MaxRise.parse(options.max_rise)
        found = smallest_within(model, held_out, choose=choose, bound=bound, remember=remember)
        mask_LE = found.keep_mask_LE
        data |= {
            "held_out": held_out.source,
            "max_rise": options.max_rise,
            "full_loss": found.full_loss,
            # keys of JSON are texts
            "losses": {str(routed): loss for routed, loss in found.tried.items()},
        }
    selection = selection_of(mask_LE, facts, method=options.method, seed=options.seed, data=data)
    if model is None or model.is_writer:
        selection.save(options.output)
    return selection


def _keep(options: SelectOptions, facts: ModelFacts) -> int | None:
    """Routed experts a layer; None where losses are to tell."""
    if options.keep is not None:
        return parse_keep(options.keep, facts)
    if options.budget_mb is not None:
        return keep_for_budget(
            options.budget_mb,
            facts,
            bytes_per_parameter=facts.bytes_per_parameter
            if options.bytes_per_parameter is None
            else options.bytes_per_parameter,
        )
    return None


def _calibration(
    options: SelectOptions, *, stats: ExpertStatistics | None, documents: Documents | None, held_out: Documents | None
) -> list[dict[str, Any]]:
    """Where the documents that choose the experts came from.

    Raises:
        ValueError: the held-out documents are among them.
    """
    if options.method == RANDOM:
        # what was read of statistics is the number of experts
        return []
    found = [documents.source] if documents else [*stats.data] if stats else []
    if held_out and held_out.source["sha256"] in [entry.get("sha256") for entry in found]:
        raise ValueError(f"--held-out {options.held_out} holds the documents that choose the experts: give others")
    return found


def _question(
    options: SelectOptions,
    model: StudiedModel,
    *,
    keep: int | None,
    stats: ExpertStatistics | None,
    calibration: list[dict[str, Any]],
    held_out: Documents | None,
) -> dict[str, Any]:
    """All that the choice depends on, as `Progress` tells one from another."""
    return {
        "model": model.facts.fingerprint,
        **asdict(model.setting),
        "method": options.method,
        "keep": keep,
        "max_rise": options.max_rise,
        "seed": options.seed if options.method == RANDOM else None,
        "stats": None if stats is None else stats.digest(),
        # what chose the documents shows in their digest
        "data": [entry.get("sha256") for entry in calibration],
        "held_out": None if held_out is None else held_out.source["sha256"],
    }


def _facts(stats: ExpertStatistics | None, model: StudiedModel | None) -> ModelFacts:
    if stats is None:
        assert model is not None
        return model.facts
    if model is not None and not stats.model.is_same(model.facts):
        raise ValueError("--stats and --checkpoint are of different models: run stats on this checkpoint")
    return stats.model


def _chooser(
    options: SelectOptions,
    facts: ModelFacts,
    *,
    stats: ExpertStatistics | None,
    model: StudiedModel | None = None,
    documents: Documents | None = None,
    remember: Remember = anew,
) -> Callable[[int], Tensor]:
    """Routed experts kept -> [L, E] bool, by the method of the options."""
    if options.method == LAYERWISE:
        assert model is not None
        assert documents is not None
        return lambda keep: select_layerwise(model, documents, keep=keep, remember=remember)
    if options.method == RANDOM:
        return lambda keep: select_random(
            num_layers=len(facts.layers), num_experts=facts.num_experts, keep=keep, seed=options.seed
        )
    assert stats is not None
    # now: that statistics lack what the method needs is said before a loss is measured
    scores_LE = SCORES[options.method](stats)
    return lambda keep: select_top(scores_LE, keep=keep)


def merge_files(options: MergeStatsOptions) -> Path:
    """Merge statistics files into one; returns its path.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they cannot be merged, or the output exists.
    """
    must_not_exist(options.output)
    return merge_stats([load_stats(path) for path in options.stats]).save(options.output)


Options = SelectOptions


def run(options: SelectOptions) -> Path:
    """Choose experts."""
    from emo_megatron.runners.launch import run_select

    return run_select(options)
