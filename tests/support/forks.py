"""Runs a script in as many ranks as torchrun would, each a fork of the process that has imported Megatron.

Most of a short run is torchrun and the imports. Torchrun's own part, and hashes that differ between ranks, are for the
tests that start it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from emo_megatron.processes import follow
from support.ranks import forking, free_port, kill_group


def run_script(
    script: Path, arguments: list[str], *, processes: int, environment: dict[str, str], timeout: float = 300.0
) -> tuple[int, str]:
    """The return code of a rank that failed, or 0, and what all ranks printed."""
    meeting = {"MASTER_PORT": str(free_port())} if processes > 1 else {}
    context = forking()
    ranks = []
    with tempfile.NamedTemporaryFile("r") as printed:
        try:
            for rank in range(processes):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                own = environment | {name: str(value) for name, value in place.items()} | meeting
                process = context.Process(target=_run, args=(script, arguments, own, Path(printed.name), os.getpid()))
                process.start()
                ranks.append(process)
            end = time.monotonic() + timeout
            while running := [process.sentinel for process in ranks if process.is_alive()]:
                if any(process.exitcode for process in ranks):
                    break
                assert wait(running, timeout=end - time.monotonic()), f"no end in {timeout} s: {printed.read()[-4000:]}"
            codes = [process.exitcode for process in ranks]
        finally:
            for process in ranks:
                kill_group(process)
        return next((code for code in codes if code), 0), printed.read()


def _run(script: Path, arguments: list[str], environment: dict[str, str], printed: Path, parent: int) -> None:
    """As `python SCRIPT ARGUMENTS`."""
    os.setsid()
    follow(parent)
    output = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    # a fork server passes over what it cannot import
    assert "support.rank_imports" in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    # what the script starts is started as anywhere
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), *environment["PYTHONPATH"].split(os.pathsep)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        # multiprocessing ends its processes without them
        atexit._run_exitfuncs()
