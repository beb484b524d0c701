"""Processes that this package starts: none goes on, with its memory and its GPU, when the command is over.

Whatever ended the command: a signal that it can answer, or one that it cannot. The second kind is the kernel's work:
every process asks it to be ended with its parent, so torchrun's ranks end with torchrun, and torchrun with the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from emo_megatron.variables import PARENT, process_environment

GRACE_SECONDS = 1.0
"""Between the signal that asks a process to end and the one that does not ask."""
_PR_SET_PDEATHSIG = 1


def run(command: Sequence[str], *, stdout: IO[bytes], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its exit status; it ends here if this process is interrupted."""
    process = start(command, stdout=stdout, environment=environment)
    try:
        return process.wait()
    finally:
        end(process)


def start(
    command: Sequence[str],
    *,
    stdout: IO[bytes],
    stderr: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a Python of this package, which ends at the latest with the thread that calls this.

    It has the variables of `process_environment` and those of `environment`, and reads no input. `stdout` and `stderr`
    are as of `subprocess.Popen`.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=process_environment() | dict(environment or {}),
    )


def end(*processes: subprocess.Popen[bytes]) -> None:
    """End processes of `start`, at first by a signal that they can answer by removing what is half written."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            # what it started follows it
            process.kill()
            process.wait()


@contextlib.contextmanager
def stops_on_signals() -> Iterator[None]:
    """Leave the block by an exception on SIGINT, SIGTERM and SIGHUP, so that what is half written is removed.

    KeyboardInterrupt, or SystemExit with the status a shell expects. A signal within GRACE_SECONDS of another one is
    the same wish again (Ctrl-C reaches a process from the terminal and from its command), and is not heard, so that
    it does not break off what the first one began. Ignored signals (nohup) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = -math.inf

    def stop(number: int, frame: object) -> None:
        nonlocal heard
        if time.monotonic() - heard < GRACE_SECONDS:
            return
        heard = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    untouched = (signal.SIG_DFL, signal.default_int_handler)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) in untouched
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_parent() -> None:
    """Called first in every process: one that `start` started, or a rank of our torchrun, ends with its parent."""
    if parent := os.environ.pop(PARENT, None):
        follow(int(parent))
        # for what multiprocessing spawns, which imports this package with the main module
        os.environ[PARENT] = str(os.getpid())


def follow(parent: int) -> None:
    """End this process, and what it forks, when process `parent`, which started it, ends (on Linux)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # nothing is to be removed yet, and the command tells of Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with(parent)
    forking: list[int] = []

    def before_fork() -> None:
        # the kernel means the thread that forks, and only the main one surely lives as long as its process
        is_main = threading.current_thread() is threading.main_thread()
        forking[:] = [os.getpid()] if is_main else []

    def in_child() -> None:
        if forking:
            _end_with(forking[0])

    os.register_at_fork(before=before_fork, after_in_child=in_child)


def _end_with(parent: int) -> None:
    if sys.platform != "linux":
        return
    if os.getppid() == parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # it may have ended before it could be followed; where another process lies between, nothing is followed
    if os.getppid() != parent and not is_running(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(process: int) -> bool:
    """Whether there is such a process, which has not ended (on Linux)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    # it may end between the two
    except (FileNotFoundError, ProcessLookupError):
        return False
    # the name before may hold anything
    return stat.rpartition(")")[2].split()[0] not in "ZX"
