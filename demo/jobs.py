"""Commands that run in order, several sequences of commands at the same time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from emo_megatron import processes

LOOK_SECONDS = 0.5
"""Time between two checks of the running commands."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command and the files of the command.

    Attributes:
        title: for people.
        command: argument vector.
        log: file that receives the output of the command.
        is_finished: whether the command ran to its end earlier, so that it need not run.
    """

    title: str
    command: list[str]
    log: Path
    is_finished: Callable[[], bool]


def run_jobs(*sequences: Sequence[Job], at_once: int = 1, finished: Callable[[], object] = lambda: None) -> None:
    """Run the jobs that are not finished. An exception, such as that of a signal, ends all running commands.

    Args:
        sequences: the jobs of one sequence run one after the other.
        at_once: number of sequences that run at the same time; earlier sequences start first.
        finished: called after every job.

    Raises:
        RuntimeError: if a job fails; the message holds the end of its log.
    """
    waiting = [[job for job in jobs if not job.is_finished()] for jobs in sequences]
    waiting = [jobs for jobs in waiting if jobs]
    running: dict[subprocess.Popen[bytes], list[Job]] = {}
    bar = tqdm(total=sum(map(len, waiting)), desc="jobs", unit="job", disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                jobs = waiting.pop(0)
                running[_start(jobs[0])] = jobs
            for process in [p for p in running if p.poll() is not None]:
                done, *rest = running.pop(process)
                if process.returncode != 0:
                    raise RuntimeError(failure(done.title, done.log, process.returncode))
                bar.update()
                finished()
                if rest:
                    waiting.insert(0, rest)
            time.sleep(LOOK_SECONDS if running else 0)
    finally:
        processes.end(*running)
        bar.close()


def _start(job: Job) -> subprocess.Popen[bytes]:
    tqdm.write(f"{job.title} ...")
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # the log of an interrupted training goes on
    with job.log.open("ab") as log:
        return processes.start(job.command, stdout=log, stderr=subprocess.STDOUT)


def failure(title: str, log: Path, code: int) -> str:
    """The message about a failed job: its exit code, the path of its log, and the log's last lines."""
    lines = log.read_text(errors="replace").splitlines()
    # a rank's own traceback is more useful than torchrun's summary of the traceback
    lines = [line for line in lines if line.startswith("[rank")] or lines
    tail = "\n".join(lines[-15:])
    return f"{title} failed with exit code {code}; the end of {log}:\n{tail}"
