"""Shared code of the benchmarks: timing of contenders in turns, medians with intervals, the machine, and output files.

Contenders take turns within every round, so other work of the machine affects all contenders, and a ratio is the median
of the ratios of single rounds. Intervals are 95 % bootstrap intervals of the median.
"""

from __future__ import annotations

import csv
import gc
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from clocks import L2_BYTES, Replay, Step, time_on_cpu, time_on_gpu

from emo_megatron.environment import collect_environment

RESULTS = Path(__file__).resolve().parent / "results"
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Seconds of every round, in the order of the rounds."""

    forward: list[float]
    total: list[float]
    """Forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A median and the 95 % bootstrap interval around it."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(median=self.median * factor, low=self.low * factor, high=self.high * factor)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long to go on: at least `fewest` rounds, then until `seconds` are spent or `most` rounds are done."""

    fewest: int
    most: int
    seconds: float


def pick_device(wish: Device) -> torch.device:
    """The device to measure.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if wish == "cuda" and not has_gpu:
        raise ValueError("--device cuda needs a CUDA device, and torch finds none; use --device cpu")
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and has_gpu) else "cpu")


def interleave(
    steps: Mapping[str, Step | Replay],
    *,
    device: torch.device,
    rounds: Rounds,
    on_round: Callable[[], Any] = lambda: None,
) -> dict[str, Samples]:
    """Time all contenders in turns, another one first in every round; one round before that warms up."""
    clock: Callable[[Any], tuple[float, float]] = time_on_gpu if device.type == "cuda" else time_on_cpu
    found = {name: Samples(forward=[], total=[]) for name in steps}
    names = list(steps)
    for name in names:
        clock(steps[name])
    started = time.perf_counter()
    with _no_garbage_collection():
        for done in range(rounds.most):
            if done >= rounds.fewest and time.perf_counter() - started > rounds.seconds:
                break
            first = done % len(names)
            for name in names[first:] + names[:first]:
                forward, total = clock(steps[name])
                found[name].forward.append(forward)
                found[name].total.append(total)
            on_round()
    return found


def estimate(values: Sequence[float]) -> Estimate:
    """The median with its bootstrap interval."""
    array = np.asarray(values)
    drawn = np.random.default_rng(0).choice(array, size=(2000, len(array)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Estimate(median=float(np.median(array)), low=float(low), high=float(high))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """How many times as long the first takes as the second, round by round."""
    return estimate([a / b for a, b in zip(numerator, denominator, strict=True)])


def judge(found: Estimate, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """`met` or `MISSED` where the whole interval says so, else `undecided`: the machine was too busy to tell."""
    low = -np.inf if at_least is None else at_least
    high = np.inf if at_most is None else at_most
    if low <= found.low and found.high <= high:
        return "met"
    return "MISSED" if found.high < low or found.low > high else "undecided"


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that copying a large tensor reads and writes, the best of some tries."""
    source = torch.zeros(L2_BYTES // 4, device=device)
    target = torch.empty_like(source)
    step = Step(forward=lambda: target.copy_(source), backward=lambda _: None)
    seconds = interleave({"copy": step}, device=device, rounds=Rounds(fewest=5, most=20, seconds=0.5))
    return 2 * L2_BYTES / min(seconds["copy"].forward)


@contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def describe_machine(device: torch.device, *, threads: int) -> dict[str, str]:
    """What a result is worth nothing without: hardware, versions, commit, date, how busy the machine was.

    Call it before Megatron is put on the CPU, which redirects the questions asked here.
    """
    report = collect_environment()
    metadata = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "hardware": report["gpus"][0] if device.type == "cuda" else _cpu_model(),
        "threads": f"{threads} of {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.1f} runnable processes (1 minute mean)",
        "system": f"{platform.system()} {platform.machine()}",
    }
    names = ("python", "torch", "megatron-core", "transformer-engine")
    metadata |= {name: report["versions"][name]["version"] for name in names}
    metadata["native ops"] = report["backends"][f"native ({device.type})"] or "available"
    if device.type == "cuda":
        metadata["driver"] = report["driver"]
    return metadata


def write_results(folder: Path, name: str, *, rows: Sequence[Mapping[str, Any]], page: str) -> list[Path]:
    """Write `name`.csv and `name`.md, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    table, text = folder / f"{name}.csv", folder / f"{name}.md"
    for path in (table, text):
        part = path.with_name(path.name + ".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            if path is table:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.write(page)
        part.replace(path)
    return [table, text]


def result_name(question: str, *, device: torch.device, is_quick: bool) -> str:
    """The file name, without suffix, of an answer: question and hardware, and that it is only a quick one."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_model()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    return f"{question}-{slug}{'-quick' if is_quick else ''}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column left, numbers right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


class Ended(Exception):
    """SIGTERM came: a benchmark of several sizes writes those it has, and leaves the others out."""


def run_script(main: Callable[[], Sequence[Path]]) -> None:
    """Run a benchmark, name its files, and tell a refusal in one line, with exit status 2."""
    signal.signal(signal.SIGTERM, _raise_ended)
    try:
        written = main()
    except Ended:
        print("error: ended before anything was measured", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path in written:
        print(path)


def _raise_ended(_number: int, _frame: object) -> None:
    raise Ended


def _cpu_model() -> str:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    return found.group(1).strip() if found else platform.machine()


def _commit() -> str:
    if commit := os.environ.get("EMO_COMMIT"):
        # a tree without a history
        return commit
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with local changes" if changed.strip() else "")
