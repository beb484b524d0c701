"""Train one of the models EMO, standard and small, and measure its loss increase with fewer experts.

    python benchmarks/fidelity.py standard --device cuda --seconds 540 --output runs/standard
    python benchmarks/fidelity.py emo --device cuda --seconds 540 --output runs/emo --partners runs

Each call trains one model, because a machine may be available for minutes only. A call that finds results of other
models in --partners compares the models. Corpus, recipe and evaluation are the demo's, at a GPU's size. If the first
hundred steps are too slow for --seconds, the run restarts with fewer steps, and the schedules of the learning rate and
the pools are shortened; a later call plans the number of steps of its partner. Writes fidelity-MODEL.json and .md (and
.png if matplotlib is installed) after every stage.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import tyro
from fidelity_page import page
from fidelity_plan import LIMITS, ON_GPU, ON_GPU_QUICK, PASSES, QUICK_LIMITS, Limits, planned_steps
from fidelity_results import MODELS, PREFIX, Partner, Result, find_partners
from fidelity_stages import EARLY, Run, settings_of
from fidelity_text import hash_corpus, read_corpus
from timing import Device, describe_machine, pick_device

from demo.corpus import Corpus, corpus_config, prepare_corpus
from demo.figure import plot_retention
from demo.recipe import Size
from emo_megatron.files import must_be_writable, whole

STOPPED = 128 + signal.SIGTERM
"""Exit status after SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train one model and measure its loss increase with fewer experts."""

    model: tyro.conf.Positional[str]
    """standard, emo, or small: a standard model with a quarter of the experts."""
    output: Path
    """Folder of the results, new or empty."""
    seconds: float
    """Seconds for the whole call."""
    device: Device = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    partners: Path | None = None
    """Folder with the results of other calls, as files or in .tgz archives."""
    corpus: Path | None = None
    """A prepared corpus: the folder corpus of a demo's output, or a file packed by `python -m demo.packages`. Default:
    built from text on this machine."""
    seed: int = 1234
    """Seed of initialisation, data order and pool sizes."""
    quick: bool = False
    """A tiny model, to test that everything runs; the numbers are not meaningful."""

    def check(self) -> None:
        """Refuse what cannot be, before any work.

        Raises:
            ValueError: says what.
        """
        if self.model not in MODELS:
            raise ValueError(f"MODEL must be one of {', '.join(MODELS)}; got {self.model}")
        # also refuses nan
        if not self.seconds >= self.limits.seconds:
            raise ValueError(
                f"--seconds must be {self.limits.seconds:g} or more, the shortest run; got {self.seconds:g}"
            )
        if self.partners is not None and not self.partners.is_dir():
            raise ValueError(f"--partners must be a folder of results; {self.partners} is none")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"--output must be a new or empty folder; {self.output} is neither")
        must_be_writable(self.output / "file")

    @property
    def limits(self) -> Limits:
        """How short a run may be."""
        return QUICK_LIMITS if self.quick else LIMITS

    @property
    def base(self) -> Path:
        """The results' files, without suffix."""
        return self.output / f"{PREFIX}{self.model}{'-quick' if self.quick else ''}"


def main(options: Options, *, started: float) -> list[Path]:
    """Prepare, train, measure; returns the files.

    Args:
        options: of the call.
        started: `time.monotonic()` when `options.seconds` began.

    Raises:
        ValueError: there is no such device, the corpus cannot be, or too few steps fit into the time.
        RuntimeError: training or evaluation failed.
    """
    options.check()
    device = pick_device(options.device)
    # of each process, as in the demo
    machine = describe_machine(device, threads=1)
    machine["commit"] = os.environ.get("EMO_COMMIT") or machine["commit"]
    work = Path(tempfile.mkdtemp(prefix="emo-fidelity-"))
    result: Result | None = None
    try:
        wanted = corpus_config(None, seed=options.seed, quick=options.quick)
        corpus = read_corpus(options.corpus, work) if options.corpus else prepare_corpus(work / "corpus", wanted)
        corpus_hash = hash_corpus(corpus)
        size, partner = _planned(options, corpus, corpus_hash=corpus_hash)
        result = Result(
            model=options.model,
            settings=settings_of(size, seed=options.seed, corpus_hash=corpus_hash),
            machine=machine,
            corpus=_metadata(corpus),
            plan={
                "planned_steps": size.steps,
                "by": partner or f"the size and at most {PASSES} passes over the text",
                "seconds": options.seconds,
                "early": EARLY,
            },
        )
        run = Run(
            result=result,
            size=size,
            has_partner=bool(partner),
            corpus=corpus,
            work=work,
            device=device.type,
            deadline=started + options.seconds,
            limits=options.limits,
            save=lambda: _save(result, options),
        )
        run.pretrain()
        run.evaluate()
        result.is_finished = True
        _save(result, options)
    finally:
        # a stage that was interrupted may have found something since the last save
        if result is not None and result.stages and not result.is_finished:
            _save(result, options)
        shutil.rmtree(work, ignore_errors=True)
    _draw(result, options)
    return sorted(options.output.glob(f"{options.base.name}.*"))


def _planned(options: Options, corpus: Corpus, *, corpus_hash: str) -> tuple[Size, str]:
    """The size, with the steps of a partner if one was trained on this text at this size; and that partner."""
    size = ON_GPU_QUICK if options.quick else ON_GPU
    settings = settings_of(size, seed=options.seed, corpus_hash=corpus_hash)
    # what the partner decides
    settings.pop("tokens")
    settings["size"].pop("steps")
    partners = find_partners(options.partners, model=options.model, settings=settings)
    for model in MODELS:
        if model in partners and not partners[model].differing:
            steps = partners[model].result.settings["size"]["steps"]
            return replace(size, steps=steps), f"the partner {model}"
    steps = planned_steps(size, train_tokens=corpus.train_tokens, limits=options.limits)
    return replace(size, steps=steps), ""


def _metadata(corpus: Corpus) -> dict[str, object]:
    stored = corpus.manifest
    return {"domains": stored["domains"], "train_tokens": corpus.train_tokens, "vocab_size": stored["vocab_size"]}


def _partners(result: Result, options: Options) -> dict[str, Partner]:
    return find_partners(options.partners, model=result.model, settings=result.settings)


def _save(result: Result, options: Options) -> None:
    """Write result and page."""
    result.save(options.base.with_suffix(".json"))
    with whole(options.base.with_suffix(".md")) as unfinished:
        unfinished.write_text(page(result, _partners(result, options)), encoding="utf-8")


def _draw(result: Result, options: Options) -> None:
    """The demo's figure of this model and those it is compared with, where matplotlib is installed."""
    together = [p.result for p in _partners(result, options).values() if not p.differing]
    rows = [row for found in (result, *together) for row in found.rows]
    caption = f"{result.settings['tokens'] / 1e6:.1f}M tokens, {result.machine['hardware']}"
    with contextlib.suppress(ImportError):
        plot_retention(rows, options.base.with_suffix(".png"), caption=caption)


def _stop(signal_number: int, frame: object) -> None:
    # a second one must not interrupt the last writing
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(STOPPED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    # imports, too, take a part of the seconds
    begun = time.monotonic() - (time.time() - psutil.Process().create_time())
    try:
        asked = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        written = main(asked, started=begun)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for path in written:
        print(path)
