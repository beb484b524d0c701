"""The traces that bench_model.py writes, and the tables made from the traces."""

from __future__ import annotations

from pathlib import Path

import torch
from models import EMO, STANDARD, Training
from timing import markdown_table, write_results
from traces import Operation, gaps_of, most_of, short, trace_step

TRACED = {STANDARD: "standard", EMO: "emo"}
"""Contender -> its part of a file's name."""


def trace_models(training: Training, folder: Path, name: str, *, head: str, device: torch.device) -> list[Path]:
    """Trace a step of the standard model and of EMO; returns the traces and the tables."""
    on_gpu = device.type == "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    traces, rows, summary = [], [], []
    steps = training.steps()
    for contender, slug in TRACED.items():
        path = folder / f"{name}-trace-{slug}.json.gz"
        operations = trace_step(steps[contender], path, device=device)
        traces.append(path)
        summary.append(summary_of(contender, operations, on_gpu=on_gpu))
        rows += [
            {
                "contender": contender,
                "operation": operation,
                "count": count,
                "device_us": round(spent, 1) if on_gpu else "",
            }
            for operation, count, spent in [
                ("all", len(operations), sum(o.end_us - o.start_us for o in operations)),
                *most_of(operations, on_gpu=on_gpu),
            ]
        ]
    kind = "kernels and copies" if on_gpu else "operations of the CPU"
    columns = ["contender", kind, "busy, %", "gaps", "gaps, ms", "longest gap, ms"]
    parts = [f"{head}## One step under the profiler\n", markdown_table(columns, summary)]
    if not on_gpu:
        parts.append("Gaps: not measured (no GPU).\n")
    for contender in TRACED:
        parts.append(f"## Most of it, {contender}\n")
        table = [
            [short(row["operation"]), str(row["count"]), str(row["device_us"])]
            for row in rows
            if row["contender"] == contender
        ]
        parts.append(markdown_table(["operation", "count", "device, us"], table))
    page = "\n".join(parts)
    print(page)
    return [*traces, *write_results(folder, f"{name}-trace", rows=rows, page=page)]


def summary_of(contender: str, operations: list[Operation], *, on_gpu: bool) -> list[str]:
    """A row of the page: how many operations, how long between them nothing ran."""
    # a driver may keep the profiler from seeing kernels
    if not on_gpu or not operations:
        return [contender, str(len(operations)), "", "", "", ""]
    gaps = gaps_of(operations)
    busy = 1 - gaps.total_us / gaps.span_us
    times = [f"{value / 1e3:.2f}" for value in (gaps.total_us, gaps.longest_us)]
    return [contender, str(len(operations)), f"{busy:.1%}", str(gaps.count), *times]
