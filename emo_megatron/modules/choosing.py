"""From options to a Selection file: read or measure statistics, choose experts, find the smallest module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from emo_megatron.modules.calibration import Documents
from emo_megatron.modules.files import must_not_exist
from emo_megatron.modules.options import MergeStatsOptions, SelectOptions
from emo_megatron.modules.select import (
    LAYERWISE,
    NEEDS_OUTPUTS,
    RANDOM,
    MaxRise,
    keep_for_budget,
    parse_keep,
    select_by_stats,
    select_layerwise,
    select_random,
    selection_of,
    smallest_within,
)
from emo_megatron.modules.selection import Selection
from emo_megatron.modules.stats import ExpertStatistics, ModelFacts, load_stats, merge_stats
from emo_megatron.modules.study import StudiedModel


def select(
    options: SelectOptions,
    *,
    model: StudiedModel | None = None,
    documents: Documents | None = None,
    held_out: Documents | None = None,
) -> Selection:
    """Choose experts and write the Selection.

    Args:
        options: of the command.
        model: the model in `options.checkpoint`; on several ranks all call alike and the first writes.
        documents: what `options.data` names.
        held_out: what `options.held_out` names.

    Raises:
        ValueError: the size is impossible, or statistics are of another model or lack what the method needs.
    """
    bound = None if options.max_rise is None else MaxRise.parse(options.max_rise)
    stats = merge_stats([load_stats(path) for path in options.stats]) if options.stats else None
    facts = _facts(stats, model)
    keep = None
    if options.keep is not None:
        keep = parse_keep(options.keep, facts)
    elif options.budget_mb is not None:
        keep = keep_for_budget(
            options.budget_mb,
            facts,
            bytes_per_parameter=facts.bytes_per_parameter
            if options.bytes_per_parameter is None
            else options.bytes_per_parameter,
        )
    if stats is None and options.method not in (LAYERWISE, RANDOM):
        assert model is not None
        assert documents is not None
        measured = model.statistics(documents.tokens, outputs=options.method in NEEDS_OUTPUTS)
        stats = measured.of(documents.source)
    choice = _chooser(options, stats=stats, model=model, documents=documents, facts=facts)
    calibration = [documents.source] if documents else [*stats.data] if stats else []
    if options.method == RANDOM:
        # what was read of statistics is the number of experts
        calibration = []
    if held_out and held_out.source["sha256"] in [entry.get("sha256") for entry in calibration]:
        raise ValueError(
            f"--held-out {options.held_out} holds the documents that choose the experts: give others"
        )
    data: dict[str, Any] = {"calibration": calibration}
    if bound is None:
        assert keep is not None
        mask_LE = choice(keep)
        data |= {} if options.budget_mb is None else {"budget_mb": options.budget_mb}
    else:
        assert model is not None
        assert held_out is not None
        found = smallest_within(model, held_out, choose=choice, bound=bound)
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


def _facts(stats: ExpertStatistics | None, model: StudiedModel | None) -> ModelFacts:
    if stats is None:
        assert model is not None
        return model.facts
    if model is not None and not stats.model.is_same(model.facts):
        raise ValueError(
            "--stats and --checkpoint are of different models: run stats on this checkpoint"
        )
    return stats.model


def _chooser(
    options: SelectOptions,
    *,
    stats: ExpertStatistics | None,
    model: StudiedModel | None,
    documents: Documents | None,
    facts: ModelFacts,
) -> Callable[[int], Tensor]:
    """Routed experts kept -> [L, E] bool, by the method of the options."""
    if options.method == LAYERWISE:
        assert model is not None
        assert documents is not None
        return lambda keep: select_layerwise(model, documents, keep=keep)
    if options.method == RANDOM:
        return lambda keep: select_random(
            num_layers=len(facts.layers),
            num_experts=facts.num_experts,
            keep=keep,
            seed=options.seed,
        )
    assert stats is not None
    known = stats
    return lambda keep: select_by_stats(known, method=options.method, keep=keep)


def merge_files(options: MergeStatsOptions) -> Path:
    """Merge statistics files into one; returns its path.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: they cannot be merged, or the output exists.
    """
    must_not_exist(options.output)
    return merge_stats([load_stats(path) for path in options.stats]).save(options.output)
