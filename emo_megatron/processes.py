"""Processes that this package starts. None keeps running, and holding memory and a GPU, after the command ends.

After signals that the command can handle, the command ends its processes. After signals that it cannot handle, the
kernel ends them: every process requests a kill at the end of its parent. torchrun ends with the command, and the ranks
end with torchrun.
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
"""Time between SIGTERM, which a process can handle, and SIGKILL."""
_PR_SET_PDEATHSIG = 1


def run(command: Sequence[str], *, stdout: IO[bytes], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its exit status. An interrupt of this process ends the command too."""
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
    """Start a Python process of this package; the process ends at the latest with the thread that calls `start`.

    The process gets the variables of `process_environment` and `environment`, and no standard input. `stdout` and
    `stderr` are those of `subprocess.Popen`.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=process_environment() | dict(environment or {}),
    )


def end(*processes: subprocess.Popen[bytes]) -> None:
    """End processes of `start`: first by SIGTERM, so that they can remove incomplete files, then by SIGKILL."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            # kill also ends the processes that the killed process started
            process.kill()
            process.wait()


@contextlib.contextmanager
def stops_on_signals() -> Iterator[None]:
    """Raise an exception in the block on SIGINT, SIGTERM and SIGHUP, so that incomplete files are removed.

    SIGINT raises KeyboardInterrupt; the others raise SystemExit with the status that a shell expects. Signals within
    GRACE_SECONDS of the first signal are ignored, so that they do not interrupt the cleanup: Ctrl-C reaches a process
    twice, from the terminal and from its command. Signals that were ignored before (nohup) stay ignored.
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
    """End this process with its parent if `start` or a torchrun of this package started it; called first."""
    if parent := os.environ.pop(PARENT, None):
        follow(int(parent))
        # for processes that multiprocessing spawns: they import this package with the main module
        os.environ[PARENT] = str(os.getpid())


def follow(parent: int) -> None:
    """End this process and its forks when process `parent`, which started this process, ends (on Linux)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # there is no file to remove yet, and the command reports Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with(parent)
    forking: list[int] = []

    def before_fork() -> None:
        # the kernel follows the thread that forks, and only the main thread surely lives as long as the process
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
    # the parent may have ended before the call; with another process in between, nothing is followed
    if os.getppid() != parent and not is_running(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(process: int) -> bool:
    """Whether the process with this id exists and has not ended (on Linux)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    # the process may end between open and read
    except (FileNotFoundError, ProcessLookupError):
        return False
    # the state comes after the command name, which may contain any characters
    return stat.rpartition(")")[2].split()[0] not in "ZX"
