"""Which schedule of pools, and which experts, give the best EMO at the demo's size? Several settings, several seeds.

    python -m demo.study                 every stage
    python -m demo.study grid            one stage

The stages, in order:

- grid: every setting of settings.py, few steps, one seed, compared on text that is kept apart (selection).
- finalists: the best settings, with the standard MoE and the small model of the same shapes; all steps, all seeds, on
  the same text. The winner has the smallest loss at 1/4 among the settings within the targets: a gap of at most .04
  and a loss increase at 1/4 of at most .14; if there are none, among all.
- validation: the winner, its standard MoE and the small model on the validation documents, which choose nothing.
- further: the winner's modules and the small model, trained further on documents of one domain, and measured on the
  validation documents of this domain.
- longer: the winner and its standard MoE for more tokens, measured several times.

Every training and every measurement is a file in the output folder. A stage skips what is finished, so an interrupted
study resumes. study.md and study.json are written again after every run; runs that are missing are listed as not run.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro

from demo import recipe
from demo.corpus import Corpus, corpus_config, describe, prepare_corpus, write_domain
from demo.further import Further, domain_data
from demo.jobs import Job, run_jobs
from demo.runs import QUICK_STARTS, SELECTION, SELECTION_STARTS, VALIDATION, Run, prepare_selection
from demo.settings import BASE, QUICK_BASE, SETTINGS, Setting, check, find
from demo.study_page import Study, gap_of, save
from emo_megatron.report.rows import CHOSEN, EMO, QUARTER, SMALL, STANDARD

Stage = Literal["grid", "finalists", "validation", "further", "longer"]
STAGES: tuple[Stage, ...] = ("grid", "finalists", "validation", "further", "longer")
FINALISTS = 3
PLACES = ("output", "corpus", "processes", "stages")
"""Options that change no number."""
LEAST = {"processes": 1, "grid_steps": 16, "steps": 16, "further_tokens": 1, "longer_steps": 16}
LOOKS = 4
"""Checkpoints of the stage longer that are measured."""


TARGETS = {"gap": 0.04, "increase": 0.14}
"""The winner has at most these, in nats per token: the gap of the full model, and the loss increase at 1/4."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare settings of EMO at the demo's size."""

    stages: tyro.conf.Positional[tuple[Stage, ...]] = STAGES
    """What to run; default: everything."""
    output: Path = Path("runs/study")
    """Folder of the study. An interrupted study resumes."""
    corpus: Path | None = None
    """Folder with one subfolder of text files per domain. Default: text found on this machine."""
    grid_steps: int = 400
    """Optimizer steps in the grid, at 16 sequences per step."""
    steps: int = 800
    """Optimizer steps of the finalists."""
    seeds: tuple[int, ...] = (1234, 1235, 1236)
    """The first seed is that of the grid and of the corpus."""
    finalists: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Settings of the second stage. Default: the three with the smallest loss of modules at 1/4 in the grid."""
    winner: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Setting of the last stages. Default: the finalist with the smallest loss at 1/4, mean over seeds, among those
    within the targets; if there are none, among all."""
    further_tokens: int = 2_000_000
    """Training tokens of one domain in the stage further."""
    longer_steps: int = 2440
    """Optimizer steps of the stage longer."""
    processes: int = 2
    """Models trained or measured at the same time, with one thread each."""
    quick: bool = False
    """Tiny models that show the mechanics; the numbers are not meaningful."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(1 <= s < 2**31 for s in self.seeds):
            raise ValueError(f"--seeds must be different numbers in [1, 2^31); got {self.seeds}")
        if not self.stages:
            raise ValueError(f"name at least one stage: {', '.join(STAGES)}")
        for flag, names in (("--finalists", self.finalists), ("--winner", filter(None, [self.winner]))):
            for name in names:
                try:
                    is_emo = find(name).model == EMO
                except ValueError as error:
                    raise ValueError(f"{flag}: {error}") from None
                if not is_emo:
                    raise ValueError(f"{flag} must be settings with pools; got {name}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One setting with pools: means over the seeds that are measured, in nats per token."""

    name: str
    loss: float
    """Of the modules with a quarter of the experts."""
    increase: float
    """Of the loss, at a quarter of the experts."""
    gaps: tuple[float, ...]
    """EMO minus the standard MoE, with all experts, for every seed of which both are measured."""

    @property
    def is_within_targets(self) -> bool:
        """Whether the setting has both targets."""
        has_gap = bool(self.gaps) and fmean(self.gaps) <= TARGETS["gap"]
        return has_gap and self.increase <= TARGETS["increase"]


def best(ranked: Sequence[Score]) -> Score:
    """The score with the smallest loss among those within the targets; if there are none, among all."""
    return min([score for score in ranked if score.is_within_targets] or ranked, key=lambda score: score.loss)


def scores(runs: Sequence[Run], text: str) -> list[Score]:
    """The settings with pools that are measured, the smallest loss at a quarter of the experts first."""
    measured = [(run, found) for run in runs if run.setting.model == EMO and (found := run.measured(text))]
    ranked = []
    for name in dict.fromkeys(run.setting.name for run, _ in measured):
        same = [found for run, found in measured if run.setting.name == name]
        gaps = [gap_of(run, runs, text) for run, _ in measured if run.setting.name == name]
        score = Score(
            name=name,
            loss=fmean(found.loss(CHOSEN, QUARTER) for found in same),
            increase=fmean(found.increase(CHOSEN, QUARTER).nats for found in same),
            gaps=tuple(gap.nats for gap in gaps if gap is not None),
        )
        ranked.append(score)
    return sorted(ranked, key=lambda score: score.loss)


class Stages:
    """The runs of every stage."""

    def __init__(self, options: Options, corpus: Corpus) -> None:
        self.options, self.corpus = options, corpus
        self.base = QUICK_BASE if options.quick else BASE

    def study(self) -> Study:
        """All runs that are known so far, for the page."""
        finalists = self.finalists(self.grid())
        winner = self.winner()
        return Study(
            corpus=self.corpus,
            grid=self.grid(),
            finalists=finalists,
            validation=self.validation(winner) if winner else [],
            further=self.further(winner) if winner else [],
            longer=self.longer(winner) if winner else [],
            options={name: value for name, value in asdict(self.options).items() if name not in PLACES},
        )

    def grid(self) -> list[Run]:
        """One short run per setting; a small model says nothing about pools."""
        chosen = [s for s in SETTINGS if s.model != SMALL]
        return [self._run(s, steps=self.options.grid_steps, seed=self.options.seeds[0]) for s in chosen]

    def finalists(self, grid: Sequence[Run]) -> list[Run]:
        """The best settings and the models of the same shapes; empty if the grid is not finished."""
        names = list(self.options.finalists) or [score.name for score in scores(grid, SELECTION)[:FINALISTS]]
        is_whole = all(run.measured(SELECTION) for run in grid)
        return self._with_same_shape(names) if self.options.finalists or is_whole else []

    def winner(self) -> Setting | None:
        """The setting of the last stages; None if it is not known yet."""
        if self.options.winner:
            return find(self.options.winner)
        runs = self.finalists(self.grid())
        if not runs or not all(run.measured(SELECTION) for run in runs):
            return None
        return find(best(scores(runs, SELECTION)).name)

    def validation(self, winner: Setting) -> list[Run]:
        """The winner, and the standard MoE and the small model of the same shape."""
        return self._with_same_shape([winner.name])

    def further(self, winner: Setting) -> list[Further]:
        """Two domains per seed: other domains for every seed."""
        found = []
        domains = self.corpus.domains
        for place, seed in enumerate(self.options.seeds):
            parents = [self._run(s, steps=self.options.steps, seed=seed) for s in (winner, _other(winner, SMALL))]
            for domain in dict.fromkeys(domains[(2 * place + d) % len(domains)] for d in range(2)):
                found += [
                    Further(parent=parent, domain=domain, tokens=self.options.further_tokens) for parent in parents
                ]
        return found

    def longer(self, winner: Setting) -> list[Run]:
        """One seed of the winner and of the standard MoE of the same shape."""
        chosen = (_other(winner, STANDARD), winner)
        steps, seed = self.options.longer_steps, self.options.seeds[0]
        return [replace(self._run(s, steps=steps, seed=seed), looks=LOOKS) for s in chosen]

    def jobs(self, stage: Stage) -> list[list[Job]]:
        """One sequence of jobs per model of a stage. Writes the text of single domains for the stage further.

        Raises:
            ValueError: the stage needs the results of an earlier one, or another setting was validated.
        """
        if stage == "grid":
            return self._sequences(self.grid(), SELECTION)
        if stage == "finalists":
            runs = self.finalists(self.grid())
            if not runs:
                raise ValueError("the stage finalists needs a finished stage grid, or --finalists")
            return self._sequences(runs, SELECTION)
        winner = self.winner()
        if winner is None:
            raise ValueError(f"the stage {stage} needs a finished stage finalists, or --winner")
        if stage == "validation":
            # the validation documents are for one setting: a second choice by them would be a choice on them
            recipe.claim(self.options.output.resolve(), {"validated setting": winner.name})
            return self._sequences(self.validation(winner), VALIDATION, others=len(self.corpus.domains) - 1)
        if stage == "further":
            further = self.further(winner)
            if missing := [f.parent.name for f in further if not f.parent.training().is_finished()]:
                names = ", ".join(dict.fromkeys(missing))
                raise ValueError(f"the stage further needs trained models: run the stage finalists for {names}")
            for item in further:
                write_domain(self.corpus, item.domain, domain_data(self.corpus, item.domain))
            return [item.jobs() for item in further]
        return self._sequences(self.longer(winner), SELECTION)

    def _sequences(self, runs: Sequence[Run], text: str, *, others: int = 0) -> list[list[Job]]:
        for run in runs:
            run.claim()
        return [[run.training(), *run.measurements(text, others=others)] for run in runs]

    def _with_same_shape(self, names: Sequence[str]) -> list[Run]:
        """The runs of settings, of the standard MoEs and of the small models of their shapes, over all seeds."""
        chosen = [find(name) for name in names]
        settings = [_other(s, STANDARD) for s in chosen] + chosen + [_other(s, SMALL) for s in chosen]
        different = {setting.name: setting for setting in settings}
        return [
            self._run(s, steps=self.options.steps, seed=seed) for seed in self.options.seeds for s in different.values()
        ]

    def _run(self, setting: Setting, *, steps: int, seed: int) -> Run:
        folder = self.options.output.resolve() / "runs"
        return Run(setting=setting, base=self.base, steps=steps, seed=seed, corpus=self.corpus, folder=folder)


def _other(setting: Setting, model: str) -> Setting:
    """The setting of another model with the same shape."""
    return find(setting.of_shape(model))


def main() -> None:
    """Run the stages and print the page."""
    options = tyro.cli(Options, prog="python -m demo.study", description=__doc__)
    base = QUICK_BASE if options.quick else BASE
    for setting in SETTINGS:
        for steps in (options.grid_steps, options.steps, options.longer_steps):
            check(setting, setting.size(steps=steps, base=base))
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with (output / "study.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another study is running in {output}: wait until it ends, or pass another folder with --output"
            ) from None
        _run(options, base, output)


def _run(options: Options, base: recipe.Size, output: Path) -> None:
    """Run the stages in a folder that no other study uses."""
    os.environ.setdefault("EMO_DEVICE", "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    source = str(options.corpus.resolve()) if options.corpus else None
    recipe.claim(output, {"kind": "study", "size": asdict(base), "seed": options.seeds[0], "corpus": source})
    config = corpus_config(options.corpus, seed=options.seeds[0], quick=options.quick)
    corpus = prepare_corpus(output / "corpus", config)
    recipe.claim(output, {"text": corpus.manifest["fingerprint"]})
    print(describe(corpus), flush=True)
    prepare_selection(corpus, starts=QUICK_STARTS if options.quick else SELECTION_STARTS)
    stages = Stages(options, corpus)
    save(stages.study(), output / "study")
    for stage in options.stages:
        run_jobs(
            *stages.jobs(stage), at_once=options.processes, finished=lambda: save(stages.study(), output / "study")
        )
    text = save(stages.study(), output / "study")
    print(text, flush=True)


if __name__ == "__main__":
    try:
        recipe.run_step(main)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
