"""Options that several commands have: how a model is run, and on which documents."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_megatron.experts.calibration import Calibration
from emo_megatron.runners import launch
from emo_megatron.runners.cache import Measured, NoCache, open_cache
from emo_megatron.runners.open import Read, is_hugging_face, open_hugging_face, open_megatron


def check_least(options: object, least: int, *names: str) -> None:
    """Refuse whole numbers among options that are below `least`, or too large for any tensor; None is no number."""
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
    no_cache: bool = False
    """Measure everything now, and keep nothing for another call."""
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

    def is_elsewhere(self, checkpoint: Path) -> bool:
        """Whether the model runs in other processes than this one, see `run_elsewhere`."""
        return not (is_hugging_face(checkpoint) or launch.is_rank())

    def run_elsewhere(self, command: str, *, log: Path) -> None:
        """Run the command again where the model runs; Megatron's own output goes to a file."""
        launch.again(command, self, processes=self.processes, log=log)

    def open(self, checkpoint: Path, *, texts: Sequence[Path]) -> tuple[Measured, Read]:
        """The model of a checkpoint, Megatron's or Hugging Face's, and what reads documents (`texts`) for it."""
        cache = NoCache() if self.no_cache else open_cache()
        if not is_hugging_face(checkpoint):
            model, read = open_megatron(
                checkpoint,
                layout=self._layout(),
                more=shlex.split(self.megatron),
                texts=texts,
                tokenizer=self.tokenizer,
                seq_length=self.seq_length,
                rows=self.rows,
            )
            return Measured(model, cache), read
        if self.processes > 1 or self.megatron:
            raise ValueError(
                f"{checkpoint} is a Hugging Face checkpoint, which runs in one process; drop --processes and "
                "--megatron, or import it into Megatron"
            )
        model, read = open_hugging_face(
            checkpoint, texts=texts, tokenizer=self.tokenizer, seq_length=self.seq_length, rows=self.rows
        )
        return Measured(model, cache), read

    def _layout(self) -> list[str]:
        """Megatron's flags for the layout."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor_parallel,
            "--pipeline-model-parallel-size": self.pipeline_parallel,
            "--expert-model-parallel-size": self.expert_parallel,
            # a rank has whole experts, whose outputs can be measured
            "--expert-tensor-parallel-size": 1,
        }
        flags = [part for name, size in sizes.items() for part in (name, str(size))]
        return [*flags, *(["--sequence-parallel"] if self.tensor_parallel > 1 else [])]


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
