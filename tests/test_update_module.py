"""benchmarks/update_module.py starts, and each of its commands is one that takes what an earlier one leaves."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import keyword
import os
from pathlib import Path
from typing import Any

import pytest
import tyro

from emo_megatron.cli import COMMANDS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
INPUTS = ("--checkpoint", "--stats", "--selection", "--parent", "--modules", "--selections", "--folder", "--adapter")


SIZES = {
    "falling": {"experts": 32, "pool_decay": 0.6, "pool_delay": 0.0},
    "delayed": {"experts": 16, "pool_decay": 0.0, "pool_delay": 0.25},
}


@pytest.fixture(params=[(model, schedule) for model in ("emo", "standard") for schedule in SIZES], ids="-".join)
def experiment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The jobs for one model of a demo that does not exist."""
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    update = importlib.import_module("update_module")
    folder = tmp_path / "update" / "corpus"
    options = update.Options(run=tmp_path / "run", output=tmp_path / "update", steps=2)
    model, schedule = request.param
    return update.Experiment(model, options, folder, size=update.Size(**SIZES[schedule]), seed=7)


def test_it_wants_a_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    update = importlib.import_module("update_module")
    update.main(update.Options(run=tmp_path, output=tmp_path / "update"))
    assert "make demo" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_demo_of_another_release_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    update = importlib.import_module("update_module")
    size = dataclasses.asdict(update.Size(experts=32))
    (tmp_path / "demo.json").write_text(json.dumps({"size": size, "seed": 5}))
    found, seed = update.size_and_seed(tmp_path)
    assert (found.experts, seed) == (32, 5)
    # a missing field would become today's default
    del size["pool_delay"]
    (tmp_path / "demo.json").write_text(json.dumps({"size": size, "seed": 5}))
    with pytest.raises(ValueError, match="--run"):
        update.size_and_seed(tmp_path)


def test_results_of_other_options_are_not_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    update = importlib.import_module("update_module")
    run, output = tmp_path / "run", tmp_path / "update"
    (run / "corpus").mkdir(parents=True)
    (run / "retention.json").write_text("[]")
    (run / "demo.json").write_text(json.dumps({"size": dataclasses.asdict(update.Size()), "seed": 5}))
    (run / "corpus" / "corpus.json").write_text(json.dumps({"fingerprint": "0", "domains": {}}))

    def stop(*_: object) -> Path:
        raise InterruptedError

    monkeypatch.setattr(update, "prepare", stop)
    (output / "emo").mkdir(parents=True)
    with pytest.raises(ValueError, match="--output"):
        update.main(update.Options(run=run, output=output))
    (output / "emo").rmdir()
    with pytest.raises(InterruptedError):
        update.main(update.Options(run=run, output=output))
    with pytest.raises(InterruptedError):
        update.main(update.Options(run=run, output=output))
    with pytest.raises(ValueError, match=r"steps.*--output"):
        update.main(update.Options(run=run, output=output, steps=61))


def test_every_command_is_one(experiment) -> None:
    jobs = experiment.jobs()
    kept = experiment.size.experts // 4
    (select,) = (job.command for job in jobs if "select" in job.command and f"{kept} routed" in job.command)
    assert "--keep" in select
    alone = [job.command for job in jobs if job.title.endswith(("training alone", "training alone-router"))]
    # the last value of a flag counts
    assert [command[len(command) - command[::-1].index("--num-experts")] for command in alone] == [str(kept)] * 2
    assert all(command[command.index("--seed") + 1] == "7" for command in alone)
    known = {experiment.parent}
    for job in jobs:
        parse = _command if "emo_megatron" in job.command else _adapter if _is_lora(job) else _training
        left = parse(job, known)
        known = known | {left}
    assert {variant.path for variant in experiment.variants()} <= known
    assert len(jobs) == len({job.title for job in jobs}) == len({job.log for job in jobs})


def _is_lora(job: Any) -> bool:
    return any(part.endswith("train_lora.py") for part in job.command)


def _adapter(job: Any, known: set[Path]) -> Path:
    """Parse the options of an adapter's training; what it leaves."""
    lora = importlib.import_module("train_lora")
    (script,) = [i for i, part in enumerate(job.command) if part.endswith("train_lora.py")]
    options = tyro.cli(lora.Options, args=job.command[script + 1 :])
    assert options.folder in known
    assert (options.steps, options.warmup, options.rows * options.seq_length) == (2, 1, 4096)
    return Path(options.output)


def _command(job: Any, known: set[Path]) -> Path:
    """Parse a command of the package; what it leaves."""
    name, *arguments = job.command[job.command.index("emo_megatron") + 1 :]
    assert name in COMMANDS
    # import is a keyword of Python
    module = name.replace("-", "_") + "_" * keyword.iskeyword(name)
    command = importlib.import_module(f"emo_megatron.commands.{module}")
    options = tyro.cli(command.Options, args=arguments)
    pairs = itertools.pairwise(arguments)
    assert {Path(value) for flag, value in pairs if flag in INPUTS} <= known
    return Path(options.output)


def _training(job: Any, known: set[Path]) -> Path:
    """Parse the flags of a training run; what it leaves."""
    from megatron.training.arguments import add_megatron_arguments

    from emo_megatron.mcore.args import add_pool_args
    from emo_megatron.runners.start import add_start_args

    (script,) = [i for i, part in enumerate(job.command) if part.endswith("pretrain_emo.py")]
    arguments = job.command[script + 1 :]
    parser = add_start_args(add_pool_args(add_megatron_arguments(argparse.ArgumentParser())))
    args = parser.parse_args(arguments)
    # Megatron refuses a schedule of pools that is longer than the training
    assert (args.pool_min_decay_samples, args.pool_delay_samples) == (0, 0)
    # two steps, of which one warms up
    assert (args.train_iters, args.lr_warmup_iters) == (2, 1)
    assert {Path(path) for path in (args.load, args.train_selection) if path} <= known
    return Path(args.save)


def test_gain_and_harm_are_of_the_untouched_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pages = importlib.import_module("update_page")
    updates = [
        pages.Update(name="parent", trained="untouched"),
        pages.Update(name="all", trained="all weights", share=1.0),
        pages.Update(name="merged-all-0.5", trained="all weights", share=0.5),
        pages.Update(name="merged-all-0.25", trained="all weights", share=0.25),
        pages.Update(name="module", trained="module alone", is_alone=True),
    ]
    losses = {
        "emo": {
            "parent": {"a": 2.0, "b": 3.0, "new": 4.5},
            "all": {"a": 2.5, "b": 3.75, "new": 3.25},
            "merged-all-0.5": {"a": 2.25, "b": 2.7499, "new": 4.498},
            # the harm is shown as zero, and so is its share of the gain
            "merged-all-0.25": {"a": 1.9992, "b": 3.0, "new": 4.25},
            "module": {"a": 9.0, "b": 9.0, "new": 5.0},
        }
    }
    head, _, *rows = pages.table(losses, updates, domain="new").splitlines()
    assert "EMO: New loss" in head
    assert rows == [
        "| untouched |  | 4.500 |  |  |  |",
        "| all weights | 1 | 3.250 | +1.250 | +.625 | .500 |",
        "|  | 1/2 | 4.498 | +.002 | +.000 | - |",
        "|  | 1/4 | 4.250 | +.250 | +.000 | .000 |",
        "| module alone |  | 5.000 | -.500 |  |  |",
    ]
    lines = pages.long_table(losses, domain="new").splitlines()
    worst, _, zero = [line.split(" | ") for line in lines if "all" in line]
    assert worst[-1] == "b +0.750 |"
    assert zero[4:6] == ["+0.000", "0.000"]


def test_the_documentation_has_rows_of_the_results() -> None:
    results = _rows(BENCHMARKS / "results" / "update-module.md")
    head, *rows = _rows(BENCHMARKS.parent / "docs" / "update.md")
    assert head == results[0]
    assert len(rows) > 10
    assert [row for row in rows if row not in results] == []


def _rows(page: Path) -> list[list[str]]:
    """The cells of a page's table of losses, with its first row; the first cell of a row names what was trained."""
    found: list[list[str]] = []
    _, mark, table = page.read_text(encoding="utf-8").partition("| trained | share |")
    for line in (mark + table).partition("\n\n")[0].splitlines():
        name, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
        found.append([name or found[-1][0], *numbers])
    return found


def test_the_page_tells_every_setting(experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    update, pages = importlib.import_module("update_module"), importlib.import_module("update_page")
    monkeypatch.setattr(pages, "describe_machine", lambda device, *, threads: {"hardware": "an abacus"})
    measured = {v.name: {"python": 2.0, update.DOMAIN: 3.0} for v in experiment.variants()}
    for name, hours in {"parent": 1, "all": 5}.items():
        file = experiment.output / "measured" / name / "retention.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (hours * 3600, hours * 3600))
    options = dataclasses.replace(experiment.options, results=tmp_path / "results")
    text = update.write_page(options, {"emo": measured, "standard": measured}, experiment)
    assert (tmp_path / "results" / "update-module.md").read_text() == text
    assert "- hardware: an abacus\n" in text
    assert "1970-01-01 01:00 to 1970-01-01 05:00" in text
    assert f"{experiment.num_kept} routed experts" in text
    assert "{" not in text
    assert max(map(len, text.partition("\n| ")[0].splitlines())) <= 120
    assert text.count("\n| ") == 1 + len(experiment.variants())
