"""Find the processes of a command by a variable of theirs, and what is left of them when the command has ended."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emo_megatron.processes import is_running

BOUND_SECONDS = 10
"""In which they are here: a loaded machine is slow, and torchrun, left alone, gives its ranks 30 s."""
TESTS = Path(__file__).resolve().parents[1]
MARK = "TEST_MARK"
DEAF = """
import emo_megatron, os, signal, sys, time
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
os.fork()
open(sys.argv[1] + "/" + str(os.getpid()), "w").close()
time.sleep(600)
"""
"""A process that hears no signal, and one that it forked; each leaves a file in the folder that it is given."""


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """A limit of `resource` for this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


class Command:
    """A running command, whose processes all inherit a variable that no others have."""

    def __init__(self, command: Sequence[object]) -> None:
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {MARK: self._mark, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # of a test run in the background Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def running(self) -> list[str]:
        """Command lines of its processes."""
        wanted = f"{MARK}={self._mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_own = wanted in (folder / "environ").read_bytes().split(b"\0")
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if is_own and is_running(int(folder.name)):
                found.append(f"{folder.name} {line}")
        return found

    def wait_for(self, is_so: Callable[[], bool], *, seconds: float = 120) -> None:
        """Wait until it is so; fail if the command ends before."""
        end = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < end, self.running()
            time.sleep(0.05)

    def end(self, *numbers: int) -> int:
        """Send signals to the command alone; its return code once nothing of it is left."""
        for number in numbers:
            self.process.send_signal(number)
        end = time.monotonic() + BOUND_SECONDS
        while left := self.running():
            if time.monotonic() > end:
                for line in left:
                    os.kill(int(line.split()[0]), signal.SIGKILL)
                raise AssertionError(left)
            time.sleep(0.05)
        return self.process.wait()
