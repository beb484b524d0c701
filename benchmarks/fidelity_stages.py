"""The stages of fidelity.py: pretrain a model and measure it, in separate processes, and save every stage."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fidelity_plan import (
    PARTNER_RESERVE,
    RESERVE,
    Limits,
    LogLine,
    Speed,
    choose_steps,
    evaluation_seconds,
    read_log,
    step_seconds,
)
from fidelity_results import Result, condition

from demo.corpus import Corpus
from demo.jobs import failure
from demo.measure import MEASURED, UNFINISHED
from demo.recipe import MEASURE, PRETRAIN, Model, Size, main_models, megatron_flags, retention_flags
from emo_megatron.commands.retention import versions
from emo_megatron.json_files import read_json
from emo_megatron.report.rows import FULL, SMALL, rows_of
from emo_megatron.report.table import share
from emo_megatron.variables import process_environment

EARLY = 0.6
"""Share of the steps after which a checkpoint is kept beside the last one."""
LOOK_SECONDS = 0.2
"""Between two looks at what a process has written."""


def settings_of(size: Size, *, seed: int, corpus_hash: str) -> dict[str, Any]:
    """What must be equal in two models that are compared."""
    return {"size": asdict(size), "tokens": size.tokens, "seed": seed, "corpus": corpus_hash}


@dataclass(kw_only=True)
class Run:
    """One model's way through the stages.

    Attributes:
        result: what is known of the model, filled as the stages are done.
        size: of the model, whose steps are those planned until its speed is known.
        has_partner: whether a partner has chosen these steps.
        corpus: its text.
        work: folder for logs and checkpoints.
        device: cpu or cuda.
        deadline: `time.monotonic()` when all must be done.
        limits: how short a run may be.
        save: writes the result, called after every stage.
    """

    result: Result
    size: Size
    has_partner: bool
    corpus: Corpus
    work: Path
    device: str
    deadline: float
    limits: Limits
    save: Callable[[], None]

    def pretrain(self) -> None:
        """Train the model, with fewer steps than planned if its first ones are slow.

        Raises:
            ValueError: too few steps fit into the time.
            RuntimeError: training failed.
        """
        fewer = self._train(self._judge)
        if fewer is not None:
            shutil.rmtree(self._folder)
            self.size = replace(self.size, steps=fewer)
            self._begin()
            self._train(lambda lines, startup: None)
        lines = read_log(self._log)
        self.result.step_seconds = step_seconds(lines)
        if self.device == "cuda" and self.result.step_seconds:
            tokens = self.size.rows * self.size.seq_length
            self.result.tokens_per_second = tokens / self.result.step_seconds
        self._done("trained")

    def evaluate(self) -> None:
        """Measure the last checkpoint, with ever fewer experts, and then the earlier one whole.

        Raises:
            RuntimeError: an evaluation failed.
        """
        self._measure(self._folder / "retention", self.size, self._take)
        left = self.deadline - time.monotonic()
        if left < 2 * self.result.plan["startup_seconds"]:
            self.result.notes.append(
                f"the checkpoint at {EARLY:.0%} of the steps was not evaluated: {left:.0f} s were left"
            )
            return
        early = self._folder / "checkpoint" / f"iter_{_early_step(self.size):07d}"
        whole = replace(self.size, fractions=())
        self._measure(self._folder / "early", whole, self._take_early, "--checkpoint", str(early))
        self._done(f"all experts at {EARLY:.0%}")

    @property
    def _folder(self) -> Path:
        return self.work / self.result.model

    @property
    def _log(self) -> Path:
        return self._folder / "train.log"

    @property
    def _model(self) -> Model:
        """The model to train, the decay of its pools fit to the steps."""
        seed = self.result.settings["seed"]
        found = next(m for m in main_models(self.size, seed=seed) if m.name == self.result.model)
        keeping = (
            *("--save-interval", str(_early_step(self.size))),
            # nothing is resumed, and with these a checkpoint is several times as large
            *("--no-save-optim", "--no-save-rng"),
        )
        return replace(found, flags=(*found.flags, *keeping))

    def _done(self, stage: str) -> None:
        self.result.stages.append(stage)
        self.save()

    def _begin(self) -> None:
        """The steps are chosen."""
        seed, corpus_hash = self.result.settings["seed"], self.result.settings["corpus"]
        self.result.settings = settings_of(self.size, seed=seed, corpus_hash=corpus_hash)
        self.result.corpus["epochs"] = self.size.tokens / self.corpus.train_tokens
        self._done("begun")

    def _train(self, judge: Callable[[list[LogLine], float], int | None]) -> int | None:
        """Train to the end, or stop where `judge`, asked as soon as the log tells a speed, says how many steps.

        Raises:
            RuntimeError: training failed.
        """
        flags = megatron_flags(self.size, self._model, corpus=self.corpus.path, run_dir=self._folder)
        began, startup, is_over = time.monotonic(), None, False
        with self._started([str(PRETRAIN), *flags], self._log) as process:
            while not is_over:
                is_over = process.poll() is not None
                lines = read_log(self._log)
                if lines and startup is None:
                    startup = time.monotonic() - began
                if startup is not None and step_seconds(lines) is not None:
                    self.result.curve = [(line.iteration, line.loss) for line in lines]
                    if (steps := judge(lines, startup)) is not None:
                        return steps
                if not is_over:
                    time.sleep(LOOK_SECONDS)
        if process.returncode != 0:
            raise RuntimeError(failure("pretraining", self._log, process.returncode))
        return None

    def _judge(self, lines: list[LogLine], startup: float) -> int | None:
        """Whether the run is too slow: fewer steps, or None to go on."""
        done, step = lines[-1].iteration, step_seconds(lines)
        assert step is not None, "asked when it is known"
        is_seen = (
            done >= min(self.limits.probe_steps, self.size.steps)
            or done * step > self.limits.probe_share * self.result.plan["seconds"]
        )
        if "begun" in self.result.stages or not is_seen:
            return None
        speed = Speed(steps=done, step_seconds=step, startup_seconds=startup)
        is_whole = self.result.model == SMALL
        after = evaluation_seconds(
            self.size, speed, num_domains=len(self.corpus.domains), fractions=() if is_whole else self.size.fractions
        )
        steps = choose_steps(
            self.size.steps,
            seconds_left=self.deadline - time.monotonic(),
            after=after,
            speed=speed,
            limits=self.limits,
            reserve=PARTNER_RESERVE if self.has_partner else RESERVE,
        )
        self.result.plan |= {
            "probe_steps": done,
            "step_seconds": step,
            "startup_seconds": startup,
            "evaluation_seconds": after,
        }
        if steps != self.size.steps:
            return steps
        self._begin()
        return None

    def _measure(self, output: Path, size: Size, take: Callable[[list[Any]], None], *more: str) -> None:
        """Measure a checkpoint, the last one unless `more` flags say which.

        `take` gets what is measured whenever there is more of it.

        Raises:
            RuntimeError: the evaluation failed.
        """
        arguments = retention_flags(size, self._model, corpus=self.corpus.path, run_dir=self._folder)
        arguments += ["--output", str(output), *more]
        log, so_far = output.with_suffix(".log"), output / UNFINISHED
        known, is_over = 0, False
        with self._started([str(MEASURE), *arguments], log) as process:
            while not is_over:
                is_over = process.poll() is not None
                rows: list[Any] = []
                # the second file replaces the first at the end
                for place in (so_far, output / MEASURED):
                    with contextlib.suppress(FileNotFoundError):
                        rows = read_json(place, kind="rows")
                if len(rows) > known:
                    known = len(rows)
                    take(rows)
                if not is_over:
                    time.sleep(LOOK_SECONDS)
        if process.returncode != 0:
            raise RuntimeError(failure("the evaluation", log, process.returncode))

    def _take(self, measured: list[dict[str, Any]]) -> None:
        """Keep what is measured of the last checkpoint."""
        result = self.result
        own = [row for row in measured if row["domain"] == row["evaluated_on"]]
        for row in own:
            name = condition(row["method"], row["num_experts_kept"])
            result.nats.setdefault(name, {})[row["domain"]] = row["nats"]
            result.document_tokens[row["domain"]] = row["document_tokens"]
        seed = result.settings["seed"]
        result.rows = rows_of(measured, model=result.model, seed=seed, versions=versions())
        kept = {row["keep_fraction"]: row["method"] for row in own}
        stages = [
            "all experts" if method == FULL else f"{share(fraction)} of the experts"
            for fraction, method in kept.items()
        ]
        result.stages += [stage for stage in stages if stage not in result.stages]
        self.save()

    def _take_early(self, measured: list[dict[str, Any]]) -> None:
        self.result.early = {row["domain"]: row["loss"] for row in measured}

    @contextlib.contextmanager
    def _started(self, arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A Python of rank 0, which ends with the block, and so does all that it started."""
        environment = process_environment() | {"EMO_DEVICE": self.device, "OMP_NUM_THREADS": "1"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _early_step(size: Size) -> int:
    return round(EARLY * size.steps)
