"""Processes started by a run: each has its own process group, which is ended as a whole, so no process remains."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None)
GRACE_SECONDS = 3
"""Between the signal that asks a command to end and the one that does not ask."""
_PR_SET_PDEATHSIG = 1


class Work:
    """A running command and all that it started.

    Args:
        command: program and arguments.
        log: gets what it prints.
        folder: its current folder.
        environment: all of its variables.
    """

    def __init__(self, command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self._is_over = False
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it took longer; either way nothing of it runs on after a few seconds of grace."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.end()

    def end(self) -> None:
        """End the whole group, at first by a signal that it can answer by writing what it has."""
        if self._is_over:
            # its number may be another's by now
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        # also what the first process left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._is_over = True


def _end_with_parent() -> None:
    # even if the run is killed, which it cannot notice; Linux only, and nothing else has GPUs
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
