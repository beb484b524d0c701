"""A command that runs itself again: its log, nothing where it did nothing, and the same options there."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from emo_megatron import cli
from emo_megatron.commands import retention, select
from emo_megatron.commands import stats as stats_command
from emo_megatron.runners import launch
from emo_megatron.variables import IN_RANKS, process_environment


@pytest.fixture
def stats(tmp_path, monkeypatch):
    """Runs the command stats, whose step prints something, ends with a status and may write to its folder."""

    def run(*, status, writes="pass"):
        output = tmp_path / "new" / "folder" / "s.safetensors"
        script = f"import sys; print('of {status}'); {writes}; sys.exit({status})"
        monkeypatch.setattr(launch, "python", lambda *_, **__: [sys.executable, "-c", script])
        options = stats_command.Options(checkpoint=tmp_path / "checkpoint", data=tmp_path / "data", output=output)
        return stats_command.run(options)

    return run


def test_a_user_error_leaves_no_folder_and_no_log(stats, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        stats(status=2)
    assert stopped.value.code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_user_error_leaves_what_was_there(stats, tmp_path):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(RuntimeError, match=r"stats stopped .* output is in .*s\.safetensors\.log"):
        stats(status=1)
    (log,) = folder.iterdir()
    assert log.read_text() == "of 1\n"
    with pytest.raises(SystemExit):
        stats(status=2)
    assert list(folder.iterdir()) == [log]
    assert log.read_text() == "of 1\n"
    assert stats(status=0).parent == folder
    assert log.read_text() == "of 0\n"


def test_what_a_step_wrote_before_its_error_stays(stats, tmp_path):
    part = tmp_path / "new" / "folder" / "part"
    with pytest.raises(SystemExit):
        stats(status=2, writes=f"open({str(part)!r}, 'w')")
    assert list(part.parent.iterdir()) == [part]


def test_the_log_of_an_interrupted_step_stays(stats, tmp_path, monkeypatch):
    def interrupted(*arguments, stdout, **options):
        stdout.write(b"so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stats(status=0)
    (log,) = (tmp_path / "new" / "folder").iterdir()
    assert (log.name, log.read_text()) == ("s.safetensors.log", "so far")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (PermissionError(13, "Permission denied", "s.json"), "error: s.json: Permission denied\n"),
        (NotImplementedError("drop --context-parallel-size"), "error: drop --context-parallel-size\n"),
    ],
)
def test_a_rank_tells_what_the_user_can_mend_in_one_line(monkeypatch, capsys, raised, told, tmp_path):
    monkeypatch.setenv(IN_RANKS, "1")
    monkeypatch.setattr(stats_command, "run", mock.Mock(side_effect=raised))
    arguments = ["stats", "--checkpoint", "c", "--data", "d", "--output", "o"]
    monkeypatch.delenv(launch.ERROR_FILE, raising=False)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == told
    # torchrun tells it once for all ranks
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error"))
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == ""
    assert f"error: {json.loads((tmp_path / 'error').read_text())['message']}\n" == told


def test_what_two_ranks_say_is_told_once(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys; from emo_megatron.runners.launch import say_error; say_error('drop --this'); sys.exit(2)"
    )
    environment = process_environment() | {IN_RANKS: "1"}
    ran = subprocess.run(launch.python(script, processes=2), env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert [line for line in ran.stderr.splitlines() if "--this" in line] == ["error: drop --this"]


def test_what_a_rank_fails_of_otherwise_keeps_its_traceback(monkeypatch):
    monkeypatch.setenv(IN_RANKS, "1")
    monkeypatch.setattr(stats_command, "run", mock.Mock(side_effect=RuntimeError("gloo")))
    with pytest.raises(RuntimeError, match="gloo"):
        cli.main(["stats", "--checkpoint", "c", "--data", "d", "--output", "o"])


PATHS = {name: Path(name).absolute() for name in ("checkpoint", "data", "validation_data", "output")}
FEW = {name: PATHS[name] for name in ("checkpoint", "data", "output")}
SOME = {"megatron_args": "--bf16 --seed 3", "nproc_per_node": 4, "expert_parallel": 2, "no_cache": True, "shots": 2}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("stats", stats_command.Options(**FEW, outputs=True, **SOME)),
        ("select", select.Options(**PATHS, method="layerwise", max_loss_increase="-0%", tokens=5, **SOME)),
        ("select", select.Options(stats=(Path("/a b"), Path("/c")), budget_mb=1e-3, output=Path("/o"))),
        ("retention", retention.Options(**PATHS, keep=(), cross_sizes=(), name="--name", num_other_domains=0, **SOME)),
        (
            "retention",
            retention.Options(**PATHS, keep=("50%", "8 routed"), methods=("reap", "random"), cross_sizes=("8 routed",)),
        ),
    ],
)
def test_the_command_line_gives_the_same_options_back(monkeypatch, command, options):
    seen = []
    module = importlib.import_module(f"emo_megatron.commands.{command}")
    monkeypatch.setattr(module, "run", seen.append)
    assert cli.main([command, *launch.arguments_of(options)]) == 0
    assert seen == [options]
