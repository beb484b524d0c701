"""The command select: choose the experts that a task needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from emo_megatron.commands.options import DataOptions, unset
from emo_megatron.experts.calibration import Calibration, Documents
from emo_megatron.experts.select import (
    LAYERWISE,
    METHODS,
    METHODS_HELP,
    RANDOM,
    MaxLossIncrease,
    check_method,
    keep_for_budget,
    parse_keep,
    parse_size,
    select_by_stats,
    select_random,
    selection_of,
)
from emo_megatron.experts.stats import ExpertStatistics, ModelMetadata, load_stats, merge_stats
from emo_megatron.files import must_not_exist
from emo_megatron.runners.cache import CachedRunner
from emo_megatron.runners.search import select_layerwise, smallest_within


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Choose the experts that a task needs, and write a Selection file for the command extract.

    Give exactly one of --keep, --max-loss-increase and --budget-mb. An interrupted command resumes when called again.

    Keep a quarter of the routed experts, from a statistics file:
        emo_megatron select --stats french.safetensors --keep 25% --output french.json

    Keep as few experts as possible while the validation loss rises by at most 1%:
        emo_megatron select --checkpoint runs/emo --data french.jsonl --max-loss-increase 1% --validation-data
        french-validation.jsonl --output french.json
    """

    output: Path
    """Selection file to write; must not exist."""
    stats: Annotated[tuple[Path, ...], unset("PATH ...", "measure --data with --checkpoint")] = ()
    """Statistics files, written by stats. Several files are merged."""
    method: Annotated[str, tyro.conf.arg(help=METHODS_HELP)] = "mean_prob"
    keep: Annotated[str | None, unset("SIZE", "not used")] = None
    """Routed experts per layer to keep: a share such as 25%, or a number such as "8 routed"."""
    max_loss_increase: Annotated[str | None, unset("BOUND", "not used")] = None
    """Keep as few experts as possible within this bound: a share of the loss such as 1%, or nats per token: 0.05."""
    budget_mb: Annotated[float | None, unset("MB", "not used")] = None
    """Keep as many experts as fit in this many megabytes of weights."""
    bytes_per_parameter: Annotated[float | None, unset("FLOAT", "as the checkpoint stores the experts")] = None
    """Bytes per parameter for --budget-mb, for example 2 for bfloat16."""
    checkpoint: Annotated[Path | None, unset("PATH", "none")] = None
    """Megatron checkpoint or Hugging Face folder, if --stats is not given, or for layerwise or --max-loss-increase."""
    data: Annotated[Path | None, unset("PATH", "none")] = None
    """Calibration documents, as for stats. Needed without --stats, and for --method layerwise."""
    validation_data: Annotated[Path | None, unset("PATH", "none")] = None
    """Validation documents, in the same formats as --data; must differ from --data. Needed for --max-loss-increase."""

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        check_method(self.method, flag="--method")
        sizes = [n for n in ("keep", "max_loss_increase", "budget_mb") if getattr(self, n) is not None]
        if len(sizes) != 1:
            raise ValueError(
                "give exactly one of --keep, --max-loss-increase and --budget-mb, which set the module size; got "
                f"{' and '.join(f'--{n}'.replace('_', '-') for n in sizes) or 'none'}"
            )
        if self.keep is not None:
            parse_size(self.keep, num_experts=1)
        for name in ("budget_mb", "bytes_per_parameter"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a finite number above 0; got {value}")
        if self.data is not None and not self.needs_data:
            reason = " with --stats" if self.stats else ""
            raise ValueError(f"--method {self.method}{reason} does not read --data: remove --data")
        if self.max_loss_increase is not None:
            MaxLossIncrease.parse(self.max_loss_increase)
            if self.validation_data is None:
                raise ValueError("--max-loss-increase needs --validation-data, documents that differ from --data")
        if self.needs_model and self.checkpoint is None:
            reason = "--max-loss-increase" if self.max_loss_increase is not None else f"--method {self.method}"
            raise ValueError(f"{reason} runs the model: give --checkpoint")
        if not self.stats and self.checkpoint is None:
            raise ValueError("give --stats, or give --checkpoint and --data to measure statistics now")
        if self.needs_data and self.data is None:
            raise ValueError(
                f"--method {self.method} needs calibration documents: give --data"
                + (" or --stats" if self.method != LAYERWISE else "")
            )

    @property
    def needs_model(self) -> bool:
        """Whether the command runs the model even if --stats is given."""
        return self.method == LAYERWISE or self.max_loss_increase is not None

    @property
    def needs_data(self) -> bool:
        """Whether the command reads calibration documents."""
        return self.method == LAYERWISE or (not self.stats and self.method != RANDOM)


def run(options: Options) -> Path:
    """Choose experts, and return the path of the Selection file."""
    must_not_exist(options.output)
    checkpoint = options.checkpoint if options.needs_model or not options.stats else None
    if checkpoint is not None and options.runs_in_ranks(checkpoint):
        options.run_in_ranks("select", log=options.output.with_name(f"{options.output.name}.log"))
        return options.output
    stats = merge_stats([load_stats(path) for path in options.stats]) if options.stats else None
    model = documents = validation = None
    if checkpoint is not None:
        data = options.data if options.needs_data else None
        validation_data = options.validation_data if options.max_loss_increase is not None else None
        model, read = options.open(checkpoint, texts=[path for path in (data, validation_data) if path])
        documents = read(data, options.calibration) if data else None
        validation = read(validation_data, Calibration(num_tokens=options.tokens)) if validation_data else None
    metadata = _metadata(stats, model)
    keep = _keep(options, metadata)
    calibration = _calibration(options.method, stats, documents)
    if validation and validation.source["sha256"] in [entry.get("sha256") for entry in calibration]:
        raise ValueError(
            f"--validation-data {options.validation_data} holds the documents that choose the experts: give others"
        )
    choose = _chooser(options.method, metadata, stats=stats, model=model, documents=documents, seed=options.seed)
    found: dict[str, Any] = {"calibration": calibration}
    if keep is not None:
        mask_LE = choose(keep)
        found |= {} if options.budget_mb is None else {"budget_mb": options.budget_mb}
    else:
        assert model
        assert validation
        assert options.max_loss_increase
        mask_LE, losses = smallest_within(
            model, validation, choose=choose, bound=MaxLossIncrease.parse(options.max_loss_increase)
        )
        found |= {
            "validation_data": validation.source,
            "max_loss_increase": options.max_loss_increase,
            "full_loss": losses[metadata.num_experts],
            # JSON keys are strings
            "losses": {str(routed): loss for routed, loss in losses.items()},
        }
    if model is None or model.is_writer:
        selection_of(mask_LE, metadata, method=options.method, seed=options.seed, data=found).save(options.output)
    return options.output


def _metadata(stats: ExpertStatistics | None, model: CachedRunner | None) -> ModelMetadata:
    if stats is None:
        assert model is not None, "__post_init__ checked the options"
        return model.metadata
    if model is not None and not stats.model.is_same(model.metadata):
        raise ValueError("--stats and --checkpoint belong to different models: run stats on this checkpoint")
    return stats.model


def _keep(options: Options, metadata: ModelMetadata) -> int | None:
    """Routed experts per layer; None if --max-loss-increase decides."""
    if options.keep is not None:
        return parse_keep(options.keep, num_experts=metadata.num_experts, top_k=metadata.top_k)
    if options.budget_mb is not None:
        size = options.bytes_per_parameter
        size = metadata.bytes_per_parameter if size is None else size
        return keep_for_budget(options.budget_mb, metadata, bytes_per_parameter=size)
    return None


def _calibration(method: str, stats: ExpertStatistics | None, documents: Documents | None) -> list[dict[str, Any]]:
    """Sources of the documents that choose the experts; empty for the method random, which reads no documents."""
    if method == RANDOM:
        return []
    return [documents.source] if documents else [*stats.data] if stats else []


def _chooser(
    method: str,
    metadata: ModelMetadata,
    *,
    stats: ExpertStatistics | None,
    model: CachedRunner | None,
    documents: Documents | None,
    seed: int,
) -> Callable[[int], Tensor]:
    """A function from the number of routed experts to keep to a mask [L, E] bool, True = keep."""
    if method == RANDOM:
        shape = {"num_layers": len(metadata.layers), "num_experts": metadata.num_experts}
        return lambda keep: select_random(**shape, keep=keep, seed=seed)
    if method == LAYERWISE:
        assert model
        assert documents
        return lambda keep: select_layerwise(model, documents, keep=keep)
    if stats is None:
        assert model
        assert documents
        stats = model.statistics(documents, outputs=METHODS[method].needs_outputs)
    taken = stats
    # raises an error now, before a loss is measured, if the statistics lack what the method needs
    select_by_stats(taken, method=method, keep=metadata.top_k)
    return lambda keep: select_by_stats(taken, method=method, keep=keep)
