"""benchmarks/update_module.py starts, and each of its commands is one that takes what an earlier one leaves."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from demo.jobs import Job

from demo.corpus import Corpus
from emo_megatron.cli import COMMANDS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
INPUTS = ("--checkpoint", "--stats", "--selection", "--parent", "--modules", "--selections")


@pytest.fixture(params=["emo", "standard"])
def study(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The jobs for one model of a demo that does not exist."""
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    update = importlib.import_module("update_module")
    manifest = {"eod_token": 0, "vocab_size": 64, "domains": {"french": {}}}
    corpus = Corpus(path=tmp_path / "run" / "corpus", manifest=manifest)
    folder = tmp_path / "update" / "corpus"
    folder.mkdir(parents=True)
    (folder / "corpus.json").write_text(json.dumps(manifest))
    options = update.Options(run=tmp_path / "run", output=tmp_path / "update", steps=2)
    return update.Study(request.param, options, corpus, folder)


def test_it_starts_and_wants_a_demo(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "update_module.py", "--run", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path} holds no finished demo: run `make demo` first\n"
    assert not list(tmp_path.iterdir())


def test_every_command_is_one(study) -> None:
    jobs = study.jobs()
    known = {study.parent}
    for job in jobs:
        if "emo_megatron" in job.command:
            known = known | {_command(job, known)}
        elif any(part.endswith("pretrain_emo.py") for part in job.command):
            known = known | {_training(job, known)}
        else:
            assert "emo_megatron.runners.rank_retention" in job.command
            assert Path(job.command[job.command.index("--load") + 1]) in known
    assert {variant.path for variant in study.variants()} <= known
    assert len(jobs) == len({job.title for job in jobs})


def _command(job: Job, known: set[Path]) -> Path:
    """Parse a command of the package; what it leaves."""
    name, *arguments = job.command[job.command.index("emo_megatron") + 1 :]
    options = tyro.cli(getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].options), args=arguments)
    pairs = itertools.pairwise(arguments)
    assert {Path(value) for flag, value in pairs if flag in INPUTS} <= known
    return Path(options.output)


def _training(job: Job, known: set[Path]) -> Path:
    """Parse the flags of a training run; what it leaves."""
    from megatron.training.arguments import add_megatron_arguments

    from emo_megatron.mcore.args import add_pool_args
    from emo_megatron.runners.start import add_start_args

    (script,) = [i for i, part in enumerate(job.command) if part.endswith("pretrain_emo.py")]
    arguments = job.command[script + 1 :]
    parser = add_start_args(add_pool_args(add_megatron_arguments(argparse.ArgumentParser())))
    args = parser.parse_args(arguments)
    # two steps, of which one warms up
    assert (args.train_iters, args.lr_warmup_iters) == (2, 1)
    assert {Path(path) for path in (args.load, args.train_selection) if path} <= known
    return Path(args.save)
