"""Benchmarks run in a process of their own, and code that runs among them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run_benchmark(name: str, *arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """A script of benchmarks/ on the CPU, after `before`, code that may break something first."""
    code = f"import runpy\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return _run(code, f"benchmarks/{name}.py", *map(str, arguments))


def answer_of(code: str) -> Any:
    """What code that can import the modules of benchmarks/ passes to `answer`, which it calls once."""
    done = _run(f"import json\nanswer = lambda found: print('answer:' + json.dumps(found))\n{code}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    return json.loads(line.removeprefix("answer:"))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    head = f"import sys\nsys.argv = sys.argv[1:]\nsys.path.insert(0, {str(BENCHMARKS)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "EMO_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
