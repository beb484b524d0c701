"""Shared code of the benchmarks that use the demo: import of the demo's modules, and commands that run in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_megatron import processes

ROOT = Path(__file__).resolve().parents[1]
# for `import demo`
sys.path.append(str(ROOT))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command, and what it leaves.

    Attributes:
        title: for people.
        command: argument vector.
        log: file that receives its output.
        is_finished: whether the work was finished earlier, so that the command need not run.
    """

    title: str
    command: list[str]
    log: Path
    is_finished: Callable[[], bool]


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run what is not finished, one job after the other; RuntimeError with the log's end where one fails."""
    for job in jobs:
        if job.is_finished():
            continue
        print(f"{job.title} ...", flush=True)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("wb") as log:
            process = processes.start(job.command, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            processes.end(process)
        if code != 0:
            raise RuntimeError(failure(job.title, job.log, code))


def failure(title: str, log: Path, code: int) -> str:
    """What to say of a job that failed: its exit code, its log, and how that ends."""
    lines = log.read_text(errors="replace").splitlines()
    # a rank's own traceback says more than torchrun's summary of it
    lines = [line for line in lines if line.startswith("[rank")] or lines
    tail = "\n".join(lines[-15:])
    return f"{title} failed with exit code {code}; the end of {log}:\n{tail}"
