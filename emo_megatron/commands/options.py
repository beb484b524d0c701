"""Options of the commands that choose experts, for the command line and for functions alike."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emo_megatron.experts.calibration import Calibration
from emo_megatron.experts.select import MaxRise, size_of

LONGEST_ROW = 4096
"""Tokens of a row where nobody says otherwise and the model could take more."""


def check_least(options: object, least: int, *names: str) -> None:
    """Refuse whole numbers among options that are below `least`, or too large for any tensor; None is no number.

    Raises:
        ValueError: naming the flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < 2**63:
            bound = f"{least} or more" if value < least else "below 2^63"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How a model is run."""

    tokenizer: Path | None = None
    """Hugging Face tokenizer for text (a folder); the checkpoint's own by default."""
    seq_length: int | None = None
    """Tokens a row; longer documents are cut. By default what the model was trained with, or 4096 if that is less."""
    rows: int = 4
    """Rows at once: more are faster and take more memory."""
    processes: int = 1
    """Processes, one a GPU, for a Megatron checkpoint. Those that no other number claims share the documents."""
    tensor_parallel: int = 1
    """Ranks that share a layer's attention and the sequence."""
    pipeline_parallel: int = 1
    """Ranks that share the layers."""
    expert_parallel: int = 1
    """Ranks that share a layer's experts."""
    megatron: str = ""
    """More of Megatron's flags, in one text after an equals sign: --megatron="--bf16 --transformer-impl local"."""

    def __post_init__(self) -> None:
        layout = ("processes", "tensor_parallel", "pipeline_parallel", "expert_parallel")
        check_least(self, 1, "rows", "seq_length", *layout)
        try:
            shlex.split(self.megatron)
        except ValueError as error:
            raise ValueError(
                f"--megatron must be flags as a shell reads them; got {self.megatron!r}: {error}"
            ) from None
        ranks = self.tensor_parallel * self.pipeline_parallel
        # experts are spread over all ranks of a pipeline stage
        if self.processes % ranks or self.processes // self.pipeline_parallel % self.expert_parallel:
            raise ValueError(
                f"--processes must be a multiple of --tensor-parallel times --pipeline-parallel, {ranks}, and its "
                f"share of a stage of --expert-parallel, {self.expert_parallel}; got {self.processes}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions(ModelOptions):
    """Which calibration documents."""

    examples: int | None = None
    """Documents taken, at random; all by default."""
    shots: int = 0
    """Documents put in front of every example, in one document with it."""
    tokens: int | None = None
    """No further document is taken once so many tokens are."""
    seed: int = 0
    """Of random choices: of documents and, by the method random, of experts."""

    def __post_init__(self) -> None:
        # super() does not find the class that slots made anew
        ModelOptions.__post_init__(self)
        check_least(self, 1, "examples", "tokens")
        check_least(self, 0, "shots", "seed")

    @property
    def calibration(self) -> Calibration:
        """Which documents."""
        return Calibration(num_examples=self.examples, num_shots=self.shots, num_tokens=self.tokens, seed=self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class StatsOptions(DataOptions):
    """Measure what the experts of a model do on calibration documents: one pass, one file."""

    checkpoint: Path
    """Megatron's (what --save named, or one iteration's folder in it) or Hugging Face's (a folder with config.json)."""
    data: Path
    """.jsonl with a "text" on every line, .safetensors with tokens and cu_seqlens, or prefix of an indexed dataset."""
    output: Path
    """Statistics file to write. Called again, an interrupted pass goes on where it was."""
    outputs: bool = False
    """Also look at what experts put out, which the methods easy_ep and reap need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeStatsOptions:
    """Merge statistics files of different documents into one: the statistics of all documents together."""

    stats: tuple[Path, ...]
    """Files of `stats`, of the same model."""
    output: Path
    """Statistics file to write."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectOptions(DataOptions):
    """Choose the experts a task needs: a Selection file, for extract.

    Give one of --keep, --max-rise and --budget-mb. Methods that rank by statistics read --stats, or measure --data
    with --checkpoint now; layerwise and --max-rise run the model.
    """

    output: Path
    """Selection file to write; must not exist. Called again, an interrupted select goes on where it was."""
    stats: tuple[Path, ...] = ()
    """Files of `stats`; several count as one."""
    method: Literal["mean_prob", "frequency", "layerwise", "easy_ep", "reap", "random"] = "mean_prob"
    """mean_prob: mean router probability, the paper's. frequency: share of tokens. layerwise: mean_prob, each layer
    measured with the earlier ones already reduced. easy_ep, reap: by what experts put out."""
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
