"""One training run of study.py: its flags, its jobs, and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo.corpus import Corpus
from demo.jobs import Job
from demo.losses import Measured, read_measured
from demo.measure import MEASURED
from demo.recipe import MEASURE, PRETRAIN, Size, claim, megatron_flags, retention_flags
from demo.settings import Setting
from emo_megatron.files import whole
from emo_megatron.report.rows import QUARTER
from emo_megatron.runners.launch import python

SELECTION = "selection"
"""Text by which settings are compared: calibration documents that choose no experts."""
VALIDATION = "validation"
SELECTION_STARTS, QUICK_STARTS = 12_000, 3_000
"""Calibration tokens per domain before the first document of the selection text. Experts are chosen by the documents up
to the first document that ends after `Size.calibration_tokens`, which is smaller."""


def prepare_selection(corpus: Corpus, *, starts: int = SELECTION_STARTS) -> None:
    """Write `selection/<domain>.safetensors` to the folder of the corpus: all calibration documents after `starts`."""
    for domain in corpus.domains:
        path = corpus.path / SELECTION / f"{domain}.safetensors"
        if path.exists():
            continue
        stored = load_file(corpus.path / "calibration" / path.name)
        ends = stored["cu_seqlens"]
        first = int(torch.searchsorted(ends, starts))
        if first >= len(ends) - 2:
            raise ValueError(
                f"--corpus: every domain needs two calibration documents after the first {starts} calibration tokens; "
                f"{domain} has {int(ends[-1])} calibration tokens. Add documents to the domain, or remove the domain."
            )
        tensors = {"tokens": stored["tokens"][ends[first] :].clone(), "cu_seqlens": ends[first:] - ends[first]}
        with whole(path) as unfinished:
            save_file(tensors, unfinished)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model to train and to measure.

    Attributes:
        setting: its pools and experts.
        base: the size that the setting changes.
        steps: optimizer steps at the base's rows per step.
        seed: of initialisation, data order and pool sizes.
        corpus: the text.
        folder: folder of all runs.
        looks: number of checkpoints that are kept and measured, evenly spaced; the last one is the finished model.
    """

    setting: Setting
    base: Size
    steps: int
    seed: int
    corpus: Corpus
    folder: Path
    looks: int = 1

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.setting.name}-{self.steps}-{self.seed}"

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.folder / self.name

    @property
    def size(self) -> Size:
        """Size of the model."""
        size = self.setting.size(steps=self.steps, base=self.base)
        return replace(size, fractions=tuple(f for f in (QUARTER, QUARTER / 2) if f in size.fractions))

    @property
    def flags(self) -> list[str]:
        """Flags of the training."""
        size = self.size
        model = self.setting.model_at(size, seed=self.seed)
        every = max(1, size.steps // max(4, self.looks))
        flags = megatron_flags(size, model, corpus=self.corpus.path, run_dir=self.path)
        return [*flags, "--save-interval", str(every)]

    @property
    def iterations(self) -> list[int]:
        """Iterations of the checkpoints that are measured."""
        steps = self.size.steps
        return [steps // self.looks * look for look in range(1, self.looks)] + [steps]

    def measured_path(self, text: str, iteration: int | None = None) -> Path:
        """The file of losses; `iteration`: None: that of the finished model."""
        suffix = "" if iteration in (None, self.size.steps) else f"-{iteration}"
        return self.path / f"{text}{suffix}" / MEASURED

    def measured(self, text: str, iteration: int | None = None) -> Measured | None:
        """The losses; None if they were not measured to the end."""
        path = self.measured_path(text, iteration)
        return read_measured(path) if path.exists() else None

    def claim(self) -> None:
        """Store what is trained in the run's folder; raise ValueError if the folder has a model of other settings."""
        size = self.size
        model = self.setting.model_at(size, seed=self.seed)
        claim(self.path, {"size": asdict(size), "flags": " ".join(model.flags)})

    def training(self) -> Job:
        """Train, from the last checkpoint if there is one."""
        tracker = self.path / "checkpoint" / "latest_checkpointed_iteration.txt"
        return Job(
            title=f"training {self.name}",
            command=python(PRETRAIN, *self.flags),
            log=self.path / "train.log",
            is_finished=lambda: tracker.exists() and tracker.read_text().strip() == str(self.size.steps),
        )

    def measurements(self, text: str, *, others: int = 0) -> list[Job]:
        """Measure every look on a text.

        Args:
            text: selection or validation.
            others: number of other domains on which the quarter modules are measured too.
        """
        return [self._measurement(text, iteration, others=others) for iteration in self.iterations]

    def _measurement(self, text: str, iteration: int, *, others: int) -> Job:
        size = self.size
        output = self.measured_path(text, iteration)
        model = self.setting.model_at(size, seed=self.seed)
        flags = retention_flags(size, model, corpus=self.corpus.path, run_dir=self.path)
        flags += ["--validation-data", str(self.corpus.path / text), "--output", str(output.parent)]
        flags += ["--num-other-domains", str(others)]
        if iteration != size.steps:
            flags += ["--checkpoint", str(self.path / "checkpoint" / f"iter_{iteration:07d}")]
        return Job(
            title=f"measuring {self.name} on {output.parent.name}",
            command=python(MEASURE, *flags),
            log=output.parent.with_suffix(".log"),
            is_finished=output.exists,
        )
