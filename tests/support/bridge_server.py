"""Imports Bridge once, which takes longer than most jobs, and runs each job in a fork of itself.

A fork sees nothing that another left behind. tests/bridge/conftest.py writes jobs, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emo_megatron.ops import why_not_native
from emo_megatron.processes import follow

TIMEOUT = 1000
"""Seconds of a job."""


def fork(call: Callable[[], Any], *, out: Path, err: Path | None = None, **environment: str) -> int:
    """Start a process that calls this, its output in files; gives its number."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        follow(parent)
        for number, path in ((1, out), (2, err or out)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ |= environment
        call()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int) -> int:
    """Its return code; what it started and left behind, such as a writer of checkpoints, ends with it."""
    _, status = os.waitpid(child, 0)
    kill_group(child)
    return os.waitstatus_to_exitcode(status)


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _run(args: list[str]) -> None:
    """As `python ARGS`, for `-m MODULE ARGS` or `SCRIPT ARGS`."""
    signal.alarm(TIMEOUT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = args[args[0] == "-m" :]
    if args[0] == "-m":
        # processes that it spawns import the module and not this one
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(args[0], run_name="__main__")


def main() -> None:
    """Answer each job with its return code."""
    follow(os.getppid())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from support import bridge_recipes, forked_writers  # noqa: F401

    # loads the compiled ops, where they are
    why_not_native("cpu")
    for line in sys.stdin:
        job = json.loads(line)
        files = {name: Path(job[name]) for name in ("out", "err")}
        child = fork(lambda args=job["args"]: _run(args), **files, **job["environment"])
        print(end_of(child), file=answers, flush=True)


if __name__ == "__main__":
    main()
