"""Run chains of commands side by side, each into its log file, with progress bars; a failure shows the log's end."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emo_megatron.processes import end, start


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and how far it is.

    Attributes:
        title: shown on its bar.
        command: argument vector.
        log: file that receives its output, replaced when the job starts.
        total: units of work.
        done: units finished so far, read from what the command writes.
        is_finished: whether the work was finished earlier, so that the command need not run.
    """

    title: str
    command: list[str]
    log: Path
    total: int
    done: Callable[[], int]
    is_finished: Callable[[], bool]


def last_iteration(log: Path) -> int:
    """The last training iteration Megatron logged, 0 before the first."""
    if not log.exists():
        return 0
    found = re.findall(r"iteration\s+(\d+)/", log.read_text(errors="replace"))
    return int(found[-1]) if found else 0


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A started job, what follows it, and its bar."""

    process: subprocess.Popen[bytes]
    job: Job
    rest: list[Job]
    bar: Any

    def show(self) -> None:
        self.bar.n = min(self.job.total, self.job.done())
        self.bar.refresh()


def run_chains(chains: list[list[Job]], *, at_once: int) -> None:
    """Run each chain's jobs in order and up to `at_once` chains side by side.

    Args:
        chains: jobs already finished are skipped.
        at_once: processes, at least 1; each computes with one thread.

    Raises:
        RuntimeError: a command failed; the others were stopped. Names the log and shows its end.
    """
    waiting = [[job for job in chain if not job.is_finished()] for chain in chains]
    waiting = [chain for chain in waiting if chain]
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                chain = waiting.pop(0)
                running.append(_start(chain[0], chain[1:]))
            time.sleep(0.5)
            for item in list(running):
                item.show()
                if item.process.poll() is None:
                    continue
                item.bar.close()
                running.remove(item)
                if item.process.returncode != 0:
                    raise RuntimeError(failure(item.job.title, item.job.log, item.process.returncode))
                if item.rest:
                    # last in line: evaluations fill the gaps beside the next training
                    waiting.append(item.rest)
    finally:
        for item in running:
            item.bar.close()
        end(*(item.process for item in running))


def _start(job: Job, rest: list[Job]) -> _Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "EMO_DEVICE": os.environ.get("EMO_DEVICE", "cpu"),
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    # a resumed job starts where it was, or the time left would be far too short
    begun = job.done()
    with job.log.open("wb") as log:
        process = start(job.command, stdout=log, stderr=subprocess.STDOUT, environment=environment)
    bar = tqdm(total=job.total, initial=begun, desc=job.title, disable=None, leave=True)
    if bar.disable:
        print(f"{job.title} ...", flush=True)
    return _Running(process=process, job=job, rest=rest, bar=bar)


def failure(title: str, log: Path, code: int) -> str:
    """What to say of a job that failed: its exit code, its log, and how that ends."""
    lines = log.read_text(errors="replace").splitlines()
    # a rank's own traceback says more than torchrun's summary of it
    lines = [line for line in lines if line.startswith("[rank")] or lines
    tail = "\n".join(lines[-15:])
    return f"{title} failed with exit code {code}; the end of {log}:\n{tail}"
