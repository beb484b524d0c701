"""emo_megatron.cli: commands reach their function, and errors are one line and status 2."""

import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.other_jobs import OTHER_JOB

from emo_megatron import cli
from emo_megatron.variables import IN_RANKS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a command that only a test runs."""

    steps: int = 3
    quick: bool = False


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A new command is one file and one line."""
    module = types.ModuleType("emo_megatron.commands.some_thing")
    vars(module).update(Options=Options, run=lambda options: Path("runs") / f"{options.steps}-{options.quick}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "some-thing", "Does something.")
    return module


def test_a_command_gets_its_options_and_says_where_results_lie(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["some-thing", "--steps", "7", "--quick"]) == 0
    assert capsys.readouterr().out == "results: runs/7-True\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


def fails(error: BaseException) -> Any:
    return mock.Mock(side_effect=error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        *(
            (kind("--steps must be 1 or more; got 0"), "--steps must be 1 or more; got 0")
            for kind in (ValueError, NotImplementedError, ImportError, PermissionError, RuntimeError)
        ),
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: the disk is full"),
        (ModuleNotFoundError("no", name="tokenizers"), "some-thing needs tokenizers"),
        (ModuleNotFoundError("no", name="tokenizers"), "pip install 'emo_megatron[demo]'"),
    ],
)
def test_errors_of_user_and_machine_are_one_line(
    error: Exception, told: str, command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = fails(error)
    assert cli.main(["some-thing"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert told in said.err
    assert "Errno" not in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), TypeError("a"), AssertionError("a"), ModuleNotFoundError("no", name="emo_megatron.no_such_module")],
)
def test_an_error_of_ours_keeps_its_traceback(error: Exception, command: types.ModuleType) -> None:
    command.run = fails(error)
    with pytest.raises(type(error)):
        cli.main(["some-thing"])


def emo(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "emo_megatron", *arguments]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False, **options)


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = emo("env", stdout=full)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output, /dev/full: the disk is full" in done.stderr


def test_a_name_that_the_output_cannot_encode_is_written_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "é").write_text("{}")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for settings in (ascii_only, {"PYTHONIOENCODING": "ascii"}):
        done = emo(
            *("merge-stats", "--stats", str(tmp_path / "é"), "--output", str(tmp_path / "ü")),
            stdout=subprocess.PIPE,
            env=os.environ | settings,
        )
        assert done.returncode == 2
        assert "not a statistics file" in done.stderr
        assert "codec" not in done.stderr


def test_a_command_says_how_to_install_what_it_needs(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run, command.INSTALL = fails(ModuleNotFoundError("no", name="megatron.bridge")), "read this page"
    assert cli.main(["some-thing"]) == 2
    assert "read this page" in capsys.readouterr().err


@pytest.mark.parametrize(
    "version", [mock.Mock(side_effect=importlib.metadata.PackageNotFoundError), mock.Mock(return_value="0.5.1")]
)
def test_bridge_missing_or_of_another_version_is_one_line(
    version: mock.Mock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["bridge", "--list"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "megatron-bridge" in err


def test_an_interrupt_is_no_traceback(command: types.ModuleType) -> None:
    command.run = fails(KeyboardInterrupt())
    assert cli.main(["some-thing"]) == 130


def test_a_command_is_no_part_of_the_job_around_it(command: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OTHER_JOB.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    command.run = lambda options: seen.extend(os.environ)
    assert cli.main(["some-thing"]) == 0
    assert seen
    assert set(seen) & OTHER_JOB.keys() == set()


@pytest.mark.parametrize("is_rank", [False, True])
def test_a_command_that_trains_and_a_rank_are_ranks_of_the_job_around_them(
    command: types.ModuleType, monkeypatch: pytest.MonkeyPatch, is_rank: bool
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("RANK", "3")
    if is_rank:
        monkeypatch.setenv(IN_RANKS, "1")
    else:
        command.IS_IN_A_JOB = True
    before = signal.getsignal(signal.SIGTERM)
    seen: dict[str, Any] = {}
    command.run = lambda options: seen.update(os.environ, signal=signal.getsignal(signal.SIGTERM))
    assert cli.main(["some-thing"]) == 0
    assert seen["RANK"] == "3"
    # what a job fetches is its own affair
    assert ("HF_HUB_OFFLINE" in seen) == is_rank
    assert (seen["signal"] == before) != is_rank


def test_env_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["versions"]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from emo_megatron import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "env" in done.stdout


def test_the_demo_is_a_script_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "make demo" in said
