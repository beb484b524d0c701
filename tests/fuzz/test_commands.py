"""Whole commands in processes of their own, with one of their files damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.judge import fuzz
from fuzz.mutations import mutated
from fuzz.test_options import VALID, check_end, check_files, state_of
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
INPUTS = 4
"""Of every command."""
MINUTES = 3
FILES = {
    "stats": ("megatron/release/.metadata", "megatron/latest_checkpointed_iteration.txt", "text.jsonl"),
    "select": ("stats.safetensors",),
    "export": ("megatron/release/.metadata", "megatron/tokenizer/tokenizer.json"),
    "import": ("qwen2_moe/config.json", "qwen2_moe/model-00001-of-00003.safetensors"),
    "extract": ("selection3.json", "megatron/release/__0_0.distcp"),
}


def members(session: int) -> list[int]:
    """Processes of a session that are there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def check(command: str, name: str, content: bytes, *, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(content)
    before = state_of(folder.parent)
    process = None
    try:
        argv = [command, *VALID[command].split()]
        process = subprocess.Popen(
            [sys.executable, "-m", "emo_megatron", *argv],
            cwd=folder,
            env={**os.environ, "EMO_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _, told = process.communicate(timeout=60 * MINUTES)
        assert not members(process.pid)
        new = [at for at in check_files(folder, before) if at.suffix != ".log"]
        check_end([*argv, path.name], process.returncode, told, new=new)
    finally:
        path.write_bytes(whole)
        if process is not None and members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("command", FILES)
def test_processes(command: str, valid: Path) -> None:
    drawn = st.one_of(st.tuples(st.just(name), mutated(name, (valid / name).read_bytes())) for name in FILES[command])
    fuzz(INPUTS, drawn, lambda found: check(command, *found, folder=valid), is_whole_process=True)
