"""Record a training step with torch's profiler: a small gzipped trace, and counts of its operations and gaps."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import Step
from torch.profiler import ProfilerActivity, profile

KEPT = ("schemaVersion", "deviceProperties", "displayTimeUnit", "baseTimeNanoseconds")
"""What a trace says beside its events."""
MOST_OPERATIONS = 15
"""Rows of the table of operations for each contender, the longest on a GPU, the most frequent on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something the device did."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Times between the first and the last operation in which none ran."""

    count: int
    total_us: float
    longest_us: float
    span_us: float
    """From the first start to the last end."""


def trace_step(step: Step, path: Path, *, device: torch.device) -> list[Operation]:
    """Run a step once to warm up and once under the profiler, whose trace goes to `path` (.json.gz).

    Returns:
        Kernels and copies of a GPU; on a CPU the operations that call no others.
    """
    on_gpu = device.type == "cuda"
    step.backward(step.forward())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        step.backward(step.forward())
        if on_gpu:
            torch.cuda.synchronize()
    part = path.with_name(path.name + ".part.json")
    found.export_chrome_trace(str(part))
    whole = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    events = whole["traceEvents"]
    # half of it will do: no arguments of calls, no arrows between them; and no names of the machine and its folders
    kept = {key: whole[key] for key in KEPT if key in whole}
    kept["traceEvents"] = [
        event if event["ph"] == "M" else {k: v for k, v in event.items() if k != "args"}
        for event in events
        if event["ph"] in ("X", "M")
    ]
    part = path.with_name(path.name + ".part")
    with gzip.open(part, "wt", encoding="utf-8") as file:
        json.dump(kept, file)
    part.replace(path)
    return list(_operations(events, on_gpu=on_gpu))


def _operations(events: Sequence[Mapping[str, Any]], *, on_gpu: bool) -> Iterator[Operation]:
    """The device's operations in a trace, in order of their start."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    found = [
        Operation(name=event["name"], start_us=event["ts"], end_us=event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    found.sort(key=lambda operation: (operation.start_us, -operation.end_us))
    for operation, after in zip(found, [*found[1:], None], strict=True):
        # on a CPU the next one starts inside an operation that calls it
        if on_gpu or after is None or after.start_us >= operation.end_us:
            yield operation


def gaps_of(operations: Sequence[Operation]) -> Gaps:
    """The gaps between operations in order of their start, which may overlap."""
    gaps = []
    end = operations[0].end_us
    for operation in operations[1:]:
        if operation.start_us > end:
            gaps.append(operation.start_us - end)
        end = max(end, operation.end_us)
    return Gaps(
        count=len(gaps), total_us=sum(gaps), longest_us=max(gaps, default=0.0), span_us=end - operations[0].start_us
    )


def most_of(operations: Sequence[Operation], *, on_gpu: bool) -> list[tuple[str, int, float]]:
    """Name, number and microseconds of the operations that make up most of a step."""
    counts = Counter(operation.name for operation in operations)
    spent: defaultdict[str, float] = defaultdict(float)
    for operation in operations:
        spent[operation.name] += operation.end_us - operation.start_us
    weight = spent if on_gpu else counts
    names = sorted(counts, key=lambda name: -weight[name])[:MOST_OPERATIONS]
    return [(name, counts[name], spent[name]) for name in names]


def short(name: str) -> str:
    """A kernel's name without its template and call arguments, fit for a table."""
    return re.sub(r"[<(].*", "", name.replace("void ", "", 1)).replace("|", "/")[:80]
