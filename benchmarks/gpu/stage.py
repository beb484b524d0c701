"""Run one stage on one machine: start the steps that fit the budget, wait for them, and update the bundle."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import builds
import machine
import steps as table
from bundle import FAILED, MIB, NOT_RUN, OK, TIMED_OUT, Bundle, Row, last_lines, log_of
from machine import ROOT
from steps import Step
from work import Work

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REHEARSAL_SECONDS = 300
"""What an elastic step may take in a rehearsal."""
REHEARSAL_PACE = 10
"""Budgets are a GPU machine's; a rehearsal, on a CPU that may be busy with other work, gets so many times as much."""


class Stopped(Exception):
    """A signal ended the run."""

    def __init__(self, number: int, _frame: object = None) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Stage:
    """Runs the steps of a stage.

    Args:
        options: the command line, checked.
        gpu: what the machine has; None in a rehearsal.
        scratch: an empty folder for everything but the bundle; the caller removes it.
    """

    def __init__(self, options: argparse.Namespace, *, gpu: machine.Gpu | None, scratch: Path) -> None:
        self._options = options
        self._pace = REHEARSAL_PACE if options.rehearse else 1
        seconds = (options.budget - table.BUNDLE_SECONDS) * self._pace
        self._end = time.monotonic() + seconds
        self._scratch = scratch
        self._running: list[Work] = []
        self._current: Step | None = None
        for name in ("results", "site", "temporary", "partners"):
            (scratch / name).mkdir()
        if options.wheels:
            machine.unpack(machine.wheels_in(options.wheels), scratch / "site")
            sys.path.insert(0, str(scratch / "site"))
        commit = options.commit or machine.commit_of(ROOT)
        self._device = "cpu" if options.rehearse else "cuda"
        self._environment = self._variables(commit, gpu)
        self._bundle = Bundle(
            output=options.output,
            results=scratch / "results",
            title=" ".join(filter(None, ["GPU stage", options.stage, options.model])),
            metadata={
                "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
                "commit": commit,
                "GPU": gpu.name if gpu else "none",
                "budget": f"{options.budget:g} s",
            },
            max_files=options.max_files,
            max_bytes=int(options.max_mib * MIB),
        )
        if options.rehearse:
            self._bundle.metadata["rehearsal"] = "on the CPU at small sizes: no figure is a GPU's"

    def run(self) -> bool:
        """Run the steps; returns whether none failed.

        Raises:
            Stopped: a signal came; the step that ran is ended, and the bundle says so.
        """
        rows, steps = self._bundle.rows, table.STAGES[self._options.stage]
        for number in SIGNALS:
            # nohup has one ignored
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _raise_stopped)
        try:
            self._start_builds()
            for step in steps:
                self._add(self._row_of(step))
        except Stopped as stopped:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self._end_all()
            for step in steps[len(rows) :]:
                row = Row(name=step.name, status=NOT_RUN, says=str(stopped))
                if step is self._current:
                    row = replace(row, status=FAILED, folder=self._folder_of(step))
                self._add(row)
            raise
        finally:
            self._end_all()
        return all(row.status in (OK, NOT_RUN) for row in rows)

    def _row_of(self, step: Step) -> Row:
        left = (self._end - time.monotonic()) / self._pace
        reason = next(filter(None, map(machine.why_lacking, step.needs)), "")
        if not reason and left < step.seconds:
            reason = f"{max(left, 0):.0f} s left, needs {step.seconds} s"
        if reason:
            return Row(name=step.name, status=NOT_RUN, says=reason)
        most = left if step.is_elastic else min(step.most_seconds or step.seconds, left)
        seconds = most * self._pace
        folder = self._folder_of(step)
        folder.mkdir()
        self._current = step
        command = self._command(step, folder=folder, seconds=seconds)
        started = time.monotonic()
        try:
            status = self._start(command, log_of(folder), step.environment).wait(seconds)
        except OSError as error:
            return Row(name=step.name, status=FAILED, says=str(error), folder=folder)
        took = time.monotonic() - started
        says = (last_lines(log_of(folder), 1) or ["it printed nothing"])[0]
        says = says.replace(f"{self._bundle.results}/", "")
        if status is None:
            says = f"ended after {seconds:.0f} s; {says}"
        elif status:
            says = f"exit status {status}: {says}"
        name = TIMED_OUT if status is None else FAILED if status else OK
        return Row(name=step.name, status=name, seconds=took, says=says, folder=folder)

    def _folder_of(self, step: Step) -> Path:
        """Of the step whose row is the next."""
        return self._bundle.results / f"{len(self._bundle.rows) + 1:02}-{step.slug}"

    def _command(self, step: Step, *, folder: Path, seconds: float) -> list[str]:
        options = self._options
        # the script must be done before it is ended
        given = REHEARSAL_SECONDS if options.rehearse else int(seconds - 10)
        values = {
            "python": sys.executable,
            "device": self._device,
            "output": str(folder),
            "builds": str(self._scratch / "builds"),
            "model": options.model,
            "seconds": str(given),
            "partners": str(options.partners or self._scratch / "partners"),
            "corpus": str(options.corpus),
        }
        more = step.rehearsal if options.rehearse else step.on_gpu
        if options.corpus:
            more = (*more, *step.with_corpus)
        return [part.format_map(values) for part in (*step.command, *more)]

    def _start(self, command: list[str], log: Path, environment: object = ()) -> Work:
        variables = self._environment | dict(environment)
        work = Work(command, log=log, folder=ROOT, environment=variables)
        self._running.append(work)
        return work

    def _start_builds(self) -> None:
        """Compile for this GPU meanwhile: to compare in stage A, or because no library was brought."""
        is_compared = self._options.stage == "A"
        if machine.why_lacking("nvcc") or (machine.LIBRARY.exists() and not is_compared):
            return
        folder = self._bundle.results / "builds"
        for path in (folder, self._scratch / "builds"):
            path.mkdir()
        variants = builds.VARIANTS if is_compared and not self._options.rehearse else ["default"]
        command = [sys.executable, "benchmarks/gpu/builds.py", "make", str(self._scratch / "builds")]
        self._start([*command, "--logs", str(folder), "--variants", *variants], log_of(folder))

    def _variables(self, commit: str, gpu: machine.Gpu | None) -> dict[str, str]:
        paths = [ROOT, ROOT / "benchmarks", self._scratch / "site", os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, map(str, paths))),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "PATH": machine.tool_path(),
            "TMPDIR": str(self._scratch / "temporary"),
            "EMO_COMMIT": commit,
            "EMO_DEVICE": self._device,
            # all is on one machine, which may have no other interface
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        }
        # what is measured is asked for by name, or falls back by itself
        variables.pop("EMO_OPS", None)
        if gpu and gpu.arch:
            variables.setdefault("EMO_CUDA_ARCHS", gpu.arch)
        return variables

    def _add(self, row: Row) -> None:
        self._bundle.rows.append(row)
        print(row, flush=True)
        self._bundle.write()

    def _end_all(self) -> None:
        for work in self._running:
            work.end()


def _raise_stopped(number: int, frame: object) -> None:
    raise Stopped(number, frame)
