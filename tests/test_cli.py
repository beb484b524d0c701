"""emo_megatron.cli: commands reach their function, and errors are one line and status 2."""

import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.other_jobs import OTHER_JOB

from emo_megatron import cli


@dataclass(frozen=True, kw_only=True)
class FakeDemoConfig:
    """Options of a demo that only a test runs."""

    steps: int = 3
    quick: bool = False


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("emo_megatron.demo.run")
    module.DemoConfig = FakeDemoConfig
    module.run_demo = lambda config: Path("runs") / f"{config.steps}-{config.quick}"
    monkeypatch.setitem(sys.modules, "emo_megatron.demo.run", module)
    return module


def test_demo_gets_its_options_and_says_where_results_lie(
    fake_demo: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--steps", "7", "--quick"]) == 0
    assert capsys.readouterr().out == "results: runs/7-True\n"


def test_demo_help_lists_its_options(fake_demo: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, ImportError, PermissionError])
def test_errors_of_the_user_are_one_line(
    kind: type[Exception], fake_demo: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        raise kind("steps must be at least 1; got 0. Raise --steps.")

    fake_demo.run_demo = run_demo
    assert cli.main(["demo", "--steps", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: steps must be at least 1; got 0. Raise --steps.\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a: the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "runs/a"), "runs/a: Read-only"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: Exception, told: str, fake_demo: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        raise error

    fake_demo.run_demo = run_demo
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert "Errno" not in said


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("a"), AssertionError("a")])
def test_an_unknown_error_keeps_its_traceback(error: Exception, fake_demo: types.ModuleType) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        raise error

    fake_demo.run_demo = run_demo
    with pytest.raises(type(error)):
        cli.main(["demo"])


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
        assert "no statistics file" in done.stderr
        assert "codec" not in done.stderr


def test_a_missing_package_names_the_extra(
    fake_demo: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)

    def run_demo(config: FakeDemoConfig) -> Path:
        import tokenizers

        return Path(tokenizers.__name__)

    fake_demo.run_demo = run_demo
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "demo needs tokenizers" in err
    assert "pip install 'emo_megatron[demo]'" in err


def test_a_command_says_how_to_install_what_it_needs(
    fake_demo: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        raise ModuleNotFoundError("no", name="megatron.bridge")

    fake_demo.run_demo = run_demo
    monkeypatch.setitem(cli.COMMANDS, "demo", replace(cli.COMMANDS["demo"], install="read this page"))
    assert cli.main(["demo"]) == 2
    assert "read this page" in capsys.readouterr().err


def test_bridge_missing_is_one_line_with_the_supported_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["bridge", "--list"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "megatron-bridge >= 0.6, < 0.7" in err


def test_bridge_of_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "0.5.1")
    assert cli.main(["bridge", "--list"]) == 2
    assert "found 0.5.1" in capsys.readouterr().err


def test_a_bug_of_ours_keeps_its_traceback(fake_demo: types.ModuleType) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        import emo_megatron.no_such_module as module

        return Path(module.__name__)

    fake_demo.run_demo = run_demo
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


def test_an_interrupt_is_no_traceback(fake_demo: types.ModuleType) -> None:
    def run_demo(config: FakeDemoConfig) -> Path:
        raise KeyboardInterrupt

    fake_demo.run_demo = run_demo
    assert cli.main(["demo"]) == 130


def test_a_command_is_no_part_of_the_job_around_it(
    fake_demo: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OTHER_JOB.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    fake_demo.run_demo = lambda config: seen.extend(os.environ)
    assert cli.main(["demo"]) == 0
    assert seen
    assert set(seen) & OTHER_JOB.keys() == set()


def test_a_command_that_trains_is_a_rank_of_the_job_around_it(
    fake_demo: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setitem(cli.COMMANDS, "demo", replace(cli.COMMANDS["demo"], is_in_a_job=True))
    before = signal.getsignal(signal.SIGTERM)
    seen: dict[str, object] = {}

    def run_demo(config: FakeDemoConfig) -> None:
        seen.update(os.environ, signal=signal.getsignal(signal.SIGTERM))

    fake_demo.run_demo = run_demo
    assert cli.main(["demo"]) == 0
    assert seen["RANK"] == "3"
    assert "HF_HUB_OFFLINE" not in seen
    assert seen["signal"] == before


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
    assert "demo" in done.stdout
