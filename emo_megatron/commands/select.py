"""The command select: choose the experts a task needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from emo_megatron.commands.options import DataOptions
from emo_megatron.experts.calibration import Calibration, Documents
from emo_megatron.experts.select import (
    LAYERWISE,
    METHODS,
    METHODS_HELP,
    RANDOM,
    MaxRise,
    check_method,
    keep_for_budget,
    parse_keep,
    select_by_stats,
    select_random,
    selection_of,
    size_of,
)
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts, load_stats, merge_stats
from emo_megatron.files import must_not_exist
from emo_megatron.runners.cache import Measured
from emo_megatron.runners.search import select_layerwise, smallest_within


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Choose the experts a task needs: a Selection file, for extract.

    Give one of --keep, --max-rise and --budget-mb. Methods that rank by statistics read --stats, or measure --data
    with --checkpoint now; layerwise and --max-rise run the model.
    """

    output: Path
    """Selection file to write; must not exist. Called again, an interrupted select goes on where it was."""
    stats: tuple[Path, ...] = ()
    """Files of `stats`; several count as one."""
    method: Annotated[str, tyro.conf.arg(help=METHODS_HELP)] = "mean_prob"
    keep: str | None = None
    """Experts a layer as the paper counts them, the shared ones included: 16; or a share of all: 12.5%."""
    max_rise: str | None = None
    """Keep as few as the loss on --held-out allows: 1% of the whole model's loss, or 0.05 nats a token."""
    budget_mb: float | None = None
    """Keep as many as fit in so many megabytes of weights."""
    bytes_per_parameter: float | None = None
    """For --budget-mb: 2 for bfloat16. By default as the checkpoint stores its experts, which extract keeps."""
    checkpoint: Path | None = None
    """The model, as for `stats`: for layerwise, --max-rise, or without --stats."""
    data: Path | None = None
    """Calibration documents, as for `stats`: for layerwise, or without --stats."""
    held_out: Path | None = None
    """Documents that choose no experts, as for `stats`: for --max-rise."""

    def __post_init__(self) -> None:
        DataOptions.__post_init__(self)
        check_method(self.method, flag="--method")
        sizes = [n for n in ("keep", "max_rise", "budget_mb") if getattr(self, n) is not None]
        if len(sizes) != 1:
            raise ValueError(
                "give one of --keep, --max-rise and --budget-mb, which say how large the module is; got "
                f"{' and '.join(f'--{n}'.replace('_', '-') for n in sizes) or 'none'}"
            )
        if self.keep is not None:
            size_of(self.keep, total=1)
        for name in ("budget_mb", "bytes_per_parameter"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be a finite number above 0; got {value}")
        if self.data is not None and not self.needs_data:
            raise ValueError(
                f"--data would not be read: --method {self.method} needs none"
                + (" beside --stats" if self.stats else "")
                + "; drop it"
            )
        if self.max_rise is not None:
            MaxRise.parse(self.max_rise)
        if self.max_rise is not None and self.held_out is None:
            raise ValueError("--max-rise needs --held-out, documents that choose no experts")
        if self.needs_model and self.checkpoint is None:
            reason = "--max-rise" if self.max_rise is not None else f"--method {self.method}"
            raise ValueError(f"{reason} runs the model: name it with --checkpoint")
        if not self.stats and self.checkpoint is None:
            raise ValueError("give --stats, or --checkpoint and --data to measure now")
        if self.needs_data and self.data is None:
            raise ValueError(
                f"--method {self.method} needs calibration documents: give --data"
                + (", or --stats" if self.method != "layerwise" else "")
            )

    @property
    def needs_model(self) -> bool:
        """Whether the model is run even if there are statistics."""
        return self.method == "layerwise" or self.max_rise is not None

    @property
    def needs_data(self) -> bool:
        """Whether calibration documents are read."""
        return self.method == "layerwise" or (not self.stats and self.method != "random")


def run(options: Options) -> Path:
    """Choose experts; returns the Selection file."""
    must_not_exist(options.output)
    checkpoint = options.checkpoint if options.needs_model or not options.stats else None
    if checkpoint is not None and options.is_elsewhere(checkpoint):
        options.run_elsewhere("select", log=options.output.with_name(f"{options.output.name}.log"))
        return options.output
    stats = merge_stats([load_stats(path) for path in options.stats]) if options.stats else None
    model = documents = validation = None
    if checkpoint is not None:
        data = options.data if options.needs_data else None
        held_out = options.held_out if options.max_rise is not None else None
        model, read = options.open(checkpoint, texts=[path for path in (data, held_out) if path])
        documents = read(data, options.calibration) if data else None
        validation = read(held_out, Calibration(num_tokens=options.tokens)) if held_out else None
    facts = _facts(stats, model)
    keep = _keep(options, facts)
    calibration = _calibration(options.method, stats, documents)
    if validation and validation.source["sha256"] in [entry.get("sha256") for entry in calibration]:
        raise ValueError(f"--held-out {options.held_out} holds the documents that choose the experts: give others")
    choose = _chooser(options.method, facts, stats=stats, model=model, documents=documents, seed=options.seed)
    found: dict[str, Any] = {"calibration": calibration}
    if keep is not None:
        mask_LE = choose(keep)
        found |= {} if options.budget_mb is None else {"budget_mb": options.budget_mb}
    else:
        assert model
        assert validation
        assert options.max_rise
        mask_LE, losses = smallest_within(model, validation, choose=choose, bound=MaxRise.parse(options.max_rise))
        found |= {
            "held_out": validation.source,
            "max_rise": options.max_rise,
            "full_loss": losses[facts.num_experts],
            # keys of JSON are texts
            "losses": {str(routed): loss for routed, loss in losses.items()},
        }
    if model is None or model.is_writer:
        selection_of(mask_LE, facts, method=options.method, seed=options.seed, data=found).save(options.output)
    return options.output


def _facts(stats: ExpertStatistics | None, model: Measured | None) -> ModelFacts:
    if stats is None:
        assert model is not None, "checked with the options"
        return model.facts
    if model is not None and not stats.model.is_same(model.facts):
        raise ValueError("--stats and --checkpoint are of different models: run stats on this checkpoint")
    return stats.model


def _keep(options: Options, facts: ModelFacts) -> int | None:
    """Routed experts a layer; None where losses are to tell."""
    if options.keep is not None:
        return parse_keep(options.keep, facts)
    if options.budget_mb is not None:
        size = options.bytes_per_parameter
        size = facts.bytes_per_parameter if size is None else size
        return keep_for_budget(options.budget_mb, facts, bytes_per_parameter=size)
    return None


def _calibration(method: str, stats: ExpertStatistics | None, documents: Documents | None) -> list[dict[str, Any]]:
    """Where the documents that choose the experts came from; what chance chooses, no document does."""
    if method == RANDOM:
        return []
    return [documents.source] if documents else [*stats.data] if stats else []


def _chooser(
    method: str,
    facts: ModelFacts,
    *,
    stats: ExpertStatistics | None,
    model: Measured | None,
    documents: Documents | None,
    seed: int,
) -> Callable[[int], Tensor]:
    """Routed experts kept -> [L, E] bool."""
    if method == RANDOM:
        shape = {"num_layers": len(facts.layers), "num_experts": facts.num_experts}
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
    # now: that statistics lack what the method needs is said before a loss is measured
    select_by_stats(taken, method=method, keep=facts.top_k)
    return lambda keep: select_by_stats(taken, method=method, keep=keep)
