"""Runs of benchmarks/gpu.sh's runner with a table of steps that a test makes, and what they leave."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from support.device import ROOT, DeviceMachine

GPU = ROOT / "benchmarks" / "gpu"
# the runner with another table: {table} assigns it
DRIVER = """
import sys
sys.path.insert(0, {gpu!r})
import machine, steps
from steps import Step

def python(name, code, seconds=20, **options):
    return Step(name=name, command=("{{python}}", "-c", code), seconds=seconds, **options)

{table}
import run
sys.exit(run.main())
"""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run left and said."""

    status: int
    out: str
    error: str
    output: Path

    @property
    def rows(self) -> dict[str, tuple[str, str]]:
        """Step to status and last line, of the summary."""
        # the pages of steps, with tables of their own, follow under headings
        head, _, _ = (self.output / "summary.md").read_text().partition("\n## ")
        lines = head.splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
        return {row[0]: (row[1], row[3]) for row in cells[2:] if len(row) == 4}

    @property
    def archive(self) -> dict[str, bytes]:
        """Its files."""
        with tarfile.open(self.output / "results.tgz") as tar:
            return {member.name: tar.extractfile(member).read() for member in tar}


def start_driver(machine: DeviceMachine, table: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    driver = DRIVER.format(gpu=str(GPU), table=table)
    return subprocess.Popen(
        [sys.executable, "-c", driver, *arguments],
        env=machine.environment | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_driver(machine: DeviceMachine, output: Path, table: str, *arguments: str, **environment: str) -> Left:
    process = start_driver(machine, table, *(arguments or ("B",)), "--output", str(output), **environment)
    out, error = process.communicate(timeout=300)
    return Left(status=process.returncode, out=out, error=error, output=output)
