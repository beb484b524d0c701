"""What a step leaves behind: its log, and nothing where it did nothing."""

from __future__ import annotations

import sys

import pytest

from emo_megatron.commands.options import StatsOptions
from emo_megatron.runners import launch
from emo_megatron.runners.open import run_command


@pytest.fixture
def stats(tmp_path, monkeypatch):
    """Runs the command stats, whose step prints something, ends with a status and may write to its folder."""

    def run(*, status, writes="pass"):
        output = tmp_path / "new" / "folder" / "s.safetensors"
        script = f"import sys; print('of {status}'); {writes}; sys.exit({status})"
        monkeypatch.setattr(launch, "python", lambda *_, **__: [sys.executable, "-c", script])
        options = StatsOptions(checkpoint=tmp_path / "checkpoint", data=tmp_path / "data", output=output)
        return launch.run_stats(options)

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


def test_a_step_tells_what_the_machine_refuses_in_one_line(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.delenv("RANK", raising=False)

    def main():
        raise PermissionError(13, "Permission denied", "s.json")

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: s.json: Permission denied\n"
