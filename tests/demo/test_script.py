"""demo.sh around stand-ins for its steps: what it starts ends with it, and a failure is told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import DEAF, Command

SCRIPT = Path(__file__).resolve().parents[2] / "demo" / "demo.sh"


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Command line of a demo whose corpus is there and whose trainings run a line of shell; and where marks lie."""
    marks = tmp_path / "up"
    marks.mkdir()
    (tmp_path / "deaf.py").write_text(DEAF)

    def make(training: str = f"exec {sys.executable} {tmp_path}/deaf.py {marks}") -> list[object]:
        stub = tmp_path / "python"
        stub.write_text(
            f'#!/bin/sh\ncase "$*" in\n*demo.recipe*) exec {sys.executable} "$@" ;;\n'
            f"*demo.corpus*) exit 0 ;;\n*) {training} ;;\nesac\n"
        )
        stub.chmod(0o755)
        monkeypatch.setenv("PYTHON", str(stub))
        return [SCRIPT, "--quick", "--output", tmp_path / "a run"]

    return make, marks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_models_that_train_side_by_side_end_with_it(demo, number, code):
    make, marks = demo
    started = Command(make())
    started.wait_for(lambda: len(list(marks.iterdir())) == 4)
    assert started.end(number) == code


def test_a_second_demo_in_the_folder_is_refused(demo):
    make, marks = demo
    first = Command(make())
    first.wait_for(lambda: len(list(marks.iterdir())) == 4)
    second = subprocess.run(make(), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "--output" in second.stderr
    first.end(signal.SIGTERM)


def test_a_failure_shows_the_end_of_its_log_and_stops_the_others(demo, tmp_path):
    make, marks = demo
    # the second model fails as soon as the first one is up
    bad = f'case "$*" in *standard*) while [ -z "$(ls {marks})" ]; do sleep 0.1; done; echo it broke; exit 3 ;; esac'
    started = Command(make(f"{bad}; exec {sys.executable} {tmp_path}/deaf.py {marks}"))
    said, _ = started.process.communicate(timeout=60)
    assert started.process.returncode == 1
    assert "train standard failed with exit code 3" in said
    assert "it broke" in said
    assert started.end() == 1


DONE = """
import pathlib, sys, time
given = dict(zip(sys.argv, sys.argv[1:]))
time.sleep(1)
if "--validation-data" in sys.argv:
    (pathlib.Path(given["--output"])).mkdir(parents=True)
    (pathlib.Path(given["--output"]) / "measured.json").touch()
else:
    folder = pathlib.Path(given["--save"])
    folder.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(given["--train-iters"])
    print(" iteration        3/      16 |", flush=True)
    time.sleep(1)
"""
"""A training or an evaluation that leaves what the demo looks for, and says nothing at first."""


def test_a_terminal_sees_how_far_it_is(demo, tmp_path):
    make, _ = demo
    (tmp_path / "done.py").write_text(DONE)
    command = make(f'case "$*" in *demo.findings*) exit 0 ;; esac; exec {sys.executable} {tmp_path}/done.py "$@"')
    reader, terminal = os.openpty()
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    # on Linux a terminal that nobody has open any more is an error
    with contextlib.suppress(OSError):
        while part := os.read(reader, 4096):
            said += part
    os.close(reader)
    assert started.wait(timeout=60) == 0, said
    assert b"train emo" in said
    assert b"iteration 3/ 16" in said
    assert all((tmp_path / "a run" / model / "losses" / "measured.json").exists() for model in ("emo", "small"))
