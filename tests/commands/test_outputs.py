"""Commands refuse to write over what exists before they read anything: what they are given here does not exist."""

from __future__ import annotations

import importlib

import pytest

from emo_megatron import cli
from emo_megatron.variables import IN_RANKS

WRITERS = {
    "extract": ("--checkpoint", "--selection"),
    "merge": ("--parent", "--modules"),
    "compose": ("--parent", "--modules"),
    "export": ("--checkpoint",),
    "import": ("--folder",),
    "select": ("--checkpoint", "--data"),
    "merge-stats": ("--stats",),
    "place": ("--stats",),
    "reorder": ("--checkpoint", "--placement"),
}
"""Commands that make what they are told to write: their inputs."""
ELSEWHERE = {
    # prints
    "env",
    # writes checkpoints by Megatron-Bridge, which goes on with what it finds
    "bridge",
    # adds to a folder, see tests/commands/test_eval_task.py
    "eval-task",
}
SIZE = {"select": ("--keep", "3 routed"), "place": ("--ranks", "2")}
STEPS = {
    "select": ("checkpoint", "data"),
    "stats": ("checkpoint", "data"),
    "retention": ("checkpoint", "data", "validation-data"),
}


REFUSED = [
    (step, kind)
    for step in STEPS
    for kind in ("file", "folder")
    # a folder's rows may be replaced
    if (step, kind) != ("retention", "folder")
]


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """What torch says when Megatron is first imported is not what a command says."""
    importlib.import_module("emo_megatron.commands.compose")


def test_every_command_that_writes_is_tested():
    assert set(cli.COMMANDS) == {*WRITERS, *STEPS, *ELSEWHERE}


@pytest.fixture
def existing(kind, tmp_path):
    """A file or a folder that somebody has."""
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_text("mine")
    yield path
    assert path.is_dir() or path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("command", WRITERS)
def test_commands_write_over_nothing(command, existing, capsys):
    inputs = [part for flag in WRITERS[command] for part in (flag, "nowhere")]
    arguments = [command, *inputs, *SIZE.get(command, ()), "--output", str(existing)]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told == f"error: {existing} exists; give another path, or remove it\n"


@pytest.mark.parametrize("command", sorted({*WRITERS, *STEPS}))
def test_commands_write_nothing_below_a_file(command, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    inputs = WRITERS.get(command, [f"--{name}" for name in STEPS.get(command, ())])
    arguments = [command, *(part for flag in inputs for part in (flag, f"no{flag}"))]
    output = mine / "new" / "output"
    assert cli.main([*arguments, *SIZE.get(command, ()), "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"cannot be written: {mine} is not a folder" in told
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize(("step", "kind"), REFUSED)
def test_commands_that_go_on_refuse_what_they_cannot_add_to(step, existing, capsys):
    inputs = [part for name in STEPS[step] for part in (f"--{name}", f"no-{name}")]
    arguments = [step, *inputs, *SIZE.get(step, ()), "--output", str(existing)]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(existing) in told


@pytest.mark.parametrize(("step", "kind"), REFUSED)
def test_ranks_refuse_it_too(step, existing, monkeypatch, capsys):
    monkeypatch.setenv(IN_RANKS, "1")
    test_commands_that_go_on_refuse_what_they_cannot_add_to(step, existing, capsys)
