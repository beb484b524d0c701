"""Options that several commands share: how to run a model, and which documents to read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from emo_megatron.experts.calibration import Calibration
from emo_megatron.runners import launch
from emo_megatron.runners.cache import CachedRunner, NoCache, open_cache
from emo_megatron.runners.open import Read, can_import, is_hugging_face, open_hugging_face, open_megatron


def unset(metavar: str, default: str) -> Any:
    """How --help shows an option whose default is None: the kind of its value, and what None means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def check_least(options: object, least: int, *names: str) -> None:
    """Raise ValueError if one of these integer options is below `least` or above 64 bits; None is allowed."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < 2**63:
            bound = f"{least} or more" if value < least else "below 2^63"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}; got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How to run a model."""

    tokenizer: Annotated[Path | None, unset("FOLDER", "the tokenizer of the checkpoint")] = None
    """Folder of a Hugging Face tokenizer, for documents that are text."""
    seq_length: Annotated[int | None, unset("INT", "as in training, at most 4096")] = None
    """Tokens per sequence. Longer documents are cut."""
    micro_batch_size: int = 4
    """Sequences per forward pass. A larger value is faster and needs more memory."""
    nproc_per_node: int = 1
    """Processes, one per GPU, for a Megatron checkpoint. Ranks beyond TP x PP split the documents."""
    tensor_parallel: int = 1
    """Tensor-parallel size; values above 1 also split the sequence."""
    pipeline_parallel: int = 1
    """Pipeline-parallel size."""
    expert_parallel: int = 1
    """Expert-parallel size."""
    no_cache: bool = False
    """Measure everything again and store nothing in the cache."""
    megatron_args: str = ""
    """More flags for Megatron, as one string after an equals sign: --megatron-args="--bf16 --seed 7"."""

    def __post_init__(self) -> None:
        layout = ("nproc_per_node", "tensor_parallel", "pipeline_parallel", "expert_parallel")
        check_least(self, 1, "micro_batch_size", "seq_length", *layout)
        try:
            shlex.split(self.megatron_args)
        except ValueError as error:
            raise ValueError(
                f"--megatron-args must be flags as a shell reads them; got {self.megatron_args!r}: {error}"
            ) from None
        ranks = self.tensor_parallel * self.pipeline_parallel
        # experts are spread over all ranks of a pipeline stage
        if self.nproc_per_node % ranks or self.nproc_per_node // self.pipeline_parallel % self.expert_parallel:
            raise ValueError(
                f"--nproc-per-node must be a multiple of --tensor-parallel times --pipeline-parallel, {ranks}, and "
                "--nproc-per-node divided by --pipeline-parallel must be a multiple of --expert-parallel, "
                f"{self.expert_parallel}; got {self.nproc_per_node}"
            )

    def runs_in_ranks(self, checkpoint: Path) -> bool:
        """Whether this process starts other processes that run the model, see `run_in_ranks`."""
        return not (is_hugging_face(checkpoint) or launch.is_rank())

    def run_in_ranks(self, command: str, *, log: Path) -> None:
        """Run the command again in the processes that run the model; Megatron's own output goes to a file."""
        launch.again(command, self, processes=self.nproc_per_node, log=log)

    def open(self, checkpoint: Path, *, texts: Sequence[Path]) -> tuple[CachedRunner, Read]:
        """Open a Megatron or Hugging Face checkpoint.

        Args:
            checkpoint: its folder.
            texts: the document files that will be read.

        Returns:
            The runner of the model, and the function that reads documents with the model's tokenizer.
        """
        cache = NoCache() if self.no_cache else open_cache()
        if not is_hugging_face(checkpoint):
            model, read = open_megatron(
                checkpoint,
                layout=self._layout(),
                more=shlex.split(self.megatron_args),
                texts=texts,
                tokenizer=self.tokenizer,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
            )
            return CachedRunner(model, cache), read
        if self.nproc_per_node > 1 or self.megatron_args:
            more = ", or import the checkpoint into Megatron with the command import" if can_import(checkpoint) else ""
            raise ValueError(
                f"{checkpoint} is a Hugging Face checkpoint, which runs in one process on one GPU: remove "
                f"--nproc-per-node and --megatron-args{more}"
            )
        model, read = open_hugging_face(
            checkpoint,
            texts=texts,
            tokenizer=self.tokenizer,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
        )
        return CachedRunner(model, cache), read

    def _layout(self) -> list[str]:
        """Megatron's flags for the layout."""
        sizes = {
            "--tensor-model-parallel-size": self.tensor_parallel,
            "--pipeline-model-parallel-size": self.pipeline_parallel,
            "--expert-model-parallel-size": self.expert_parallel,
            # every rank has whole experts, so that the outputs of experts can be measured
            "--expert-tensor-parallel-size": 1,
        }
        flags = [part for name, size in sizes.items() for part in (name, str(size))]
        return [*flags, *(["--sequence-parallel"] if self.tensor_parallel > 1 else [])]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions(ModelOptions):
    """Which calibration documents to read."""

    examples: Annotated[int | None, unset("INT", "all")] = None
    """Number of documents, chosen at random."""
    shots: int = 0
    """Number of documents put before every example, in the same document as the example."""
    tokens: Annotated[int | None, unset("INT", "no limit")] = None
    """Stop adding documents when this number of tokens is reached."""
    seed: int = 0
    """Seed of the random choice of documents and, with the method random, of experts."""

    def __post_init__(self) -> None:
        # super() does not find the class that slots made anew
        ModelOptions.__post_init__(self)
        check_least(self, 1, "examples", "tokens")
        check_least(self, 0, "shots", "seed")

    @property
    def calibration(self) -> Calibration:
        """Which documents to read."""
        return Calibration(num_examples=self.examples, num_shots=self.shots, num_tokens=self.tokens, seed=self.seed)
