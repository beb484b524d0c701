"""Train a module and the small model further on documents of one domain, with the same tokens and learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.corpus import Corpus
from demo.jobs import Job
from demo.losses import Measured, read_measured
from demo.measure import MEASURED
from demo.recipe import MEASURE, PRETRAIN, Model, megatron_flags, retention_flags
from demo.runs import VALIDATION, Run
from demo.settings import find
from emo_megatron.report.rows import EMO, SMALL
from emo_megatron.runners.launch import python

LR = 1e-3
"""Largest learning rate; pretraining ends at 3e-4. Falls to a tenth along a cosine."""
BEFORE, AFTER = "before", "after"


def domain_data(corpus: Corpus, domain: str) -> Path:
    """Prefix of the training documents of a domain."""
    return corpus.path / "domains" / domain


@dataclass(frozen=True, kw_only=True)
class Further:
    """A pretrained model and a domain. Of EMO, the module with a quarter of the experts is trained, without pools.

    Attributes:
        parent: the finished model.
        domain: name of the domain.
        tokens: training tokens.
    """

    parent: Run
    domain: str
    tokens: int

    @property
    def name(self) -> str:
        """Name of the folder."""
        return f"{self.parent.name}-{self.domain}-{self.steps}"

    @property
    def path(self) -> Path:
        """Folder of the module and the trained model."""
        return self.parent.folder / "further" / self.name

    @property
    def start(self) -> Path:
        """The checkpoint that is trained further."""
        return self.path / "module" if self.parent.setting.model == EMO else self.parent.path / "checkpoint"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.tokens / (self.parent.size.rows * self.parent.size.seq_length))

    @property
    def passes(self) -> float:
        """How often the training text is read."""
        text: int = self.parent.corpus.manifest["domains"][self.domain]["tokens"]["train"]
        return self.steps * self.parent.size.rows * self.parent.size.seq_length / text

    @property
    def _small(self) -> Model:
        small = find(self.parent.setting.of_shape(SMALL))
        return small.model_at(self.parent.size, seed=self.parent.seed)

    def loss(self, when: str) -> Measured | None:
        """The losses before or after; None if they were not measured."""
        path = self._measured(when)
        return read_measured(path) if path.exists() else None

    def jobs(self) -> list[Job]:
        """Cut the module out, measure, train, measure."""
        cut = self._cut() if self.parent.setting.model == EMO else []
        trained = self.path / "checkpoint"
        return [*cut, self._measurement(BEFORE, self.start), self._training(trained), self._measurement(AFTER, trained)]

    def _cut(self) -> list[Job]:
        size, checkpoint = self.parent.size, self.parent.path / "checkpoint"
        stats, selection = self.path / "stats.safetensors", self.path / "selection.json"
        data = self.parent.corpus.path / "calibration" / f"{self.domain}.safetensors"
        read = ("--tokens", size.calibration_tokens, "--seq-length", size.seq_length)
        return [
            self._command(stats, "stats", "--checkpoint", checkpoint, "--data", data, *read),
            self._command(selection, "select", "--stats", stats, "--keep", f"{size.experts // 4} routed"),
            self._command(self.start, "extract", "--checkpoint", checkpoint, "--selection", selection),
        ]

    def _command(self, result: Path, *arguments: object) -> Job:
        return Job(
            title=f"{self.name}: {arguments[0]}",
            command=python("-m", "emo_megatron", *arguments, "--output", result),
            log=self.path / f"{arguments[0]}.log",
            is_finished=result.exists,
        )

    def _training(self, output: Path) -> Job:
        corpus, size, steps = self.parent.corpus, self.parent.size, self.steps
        tracker = output / "latest_checkpointed_iteration.txt"
        # an interrupted training begins again: it takes minutes
        own: Sequence[object] = (
            *("--load", self.start, "--finetune", "--data-path", domain_data(corpus, self.domain)),
            *("--train-iters", steps, "--save-interval", steps, "--no-save-optim", "--no-save-rng"),
            *("--lr", LR, "--min-lr", LR / 10, "--lr-warmup-iters", min(20, steps // 4)),
        )
        flags = megatron_flags(size, self._small, corpus=corpus.path, run_dir=self.path)
        return Job(
            title=f"training {self.name}",
            command=python(PRETRAIN, *flags, *own),
            log=self.path / "train.log",
            is_finished=lambda: tracker.exists() and tracker.read_text().strip() == str(steps),
        )

    def _measurement(self, when: str, checkpoint: Path) -> Job:
        size, corpus, output = self.parent.size, self.parent.corpus.path, self._measured(when)
        flags = retention_flags(size, self._small, corpus=corpus, run_dir=self.path)
        # the flags of a small model keep all experts
        own: dict[str, object] = {
            "--checkpoint": checkpoint,
            "--data": corpus / "calibration" / f"{self.domain}.safetensors",
            "--validation-data": corpus / VALIDATION / f"{self.domain}.safetensors",
            "--output": output.parent,
        }
        return Job(
            title=f"measuring {self.name} {when}",
            command=python(MEASURE, *flags, *(item for pair in own.items() for item in pair)),
            log=output.parent.with_suffix(".log"),
            is_finished=output.exists,
        )

    def _measured(self, when: str) -> Path:
        return self.path / when / MEASURED
