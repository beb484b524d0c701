"""The command retention: measure a model with fewer experts, then write rows, table and figure."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from emo_megatron import __version__
from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.experts.select import MaxRise
from emo_megatron.files import whole
from emo_megatron.report.retention_methods import cliffs_table, find_cliffs, full_report, methods_table
from emo_megatron.report.retention_methods_figure import plot_methods
from emo_megatron.report.retention_rows import RetentionRow, load_rows, rows_of, save_rows
from emo_megatron.runners import launch
from emo_megatron.runners.retention import read_rows


def run_retention(options: RetentionOptions) -> Path:
    """Measure what is missing and print table and cliffs.

    Returns:
        The output folder, with retention.csv and retention.json of this model, and retention.txt and retention.png of
        this one and those beside.

    Raises:
        ValueError, SystemExit: what was asked for cannot be; where the model runs, its processes said why.
        RuntimeError: they failed.
    """
    beside = _beside(options)
    bound = MaxRise.parse(options.max_rise)
    measured = read_rows(launch.run_retention(options))
    own = rows_of(measured, model=options.name, seed=options.seed, versions=versions())
    save_rows(own, options.output / "retention")
    rows = [*own, *beside]
    report = full_report(rows, bound)
    with whole(options.output / "retention.txt") as unfinished:
        unfinished.write_text(report, encoding="utf-8")
    plot_methods(rows, options.output / "retention.png", caption=_caption(own), bound=bound)
    means = [cliff for cliff in find_cliffs(rows, bound) if cliff.domain is None]
    print(methods_table(rows), end="\n\n\n")
    # of a single domain there is no mean
    print(cliffs_table(means or find_cliffs(rows, bound), bound), end="\n\n")
    return options.output


def versions() -> str:
    """What measures, for people."""
    names = ("torch", "megatron-core")
    return ", ".join([f"emo_megatron {__version__}", *(f"{n} {importlib.metadata.version(n)}" for n in names)])


def _beside(options: RetentionOptions) -> list[RetentionRow]:
    rows = [row for path in options.beside for row in load_rows(path)]
    if any(row.model == options.name for row in rows):
        raise ValueError(f"--beside holds rows of a model called {options.name}, too; give this one another --name")
    return rows


def _caption(rows: list[RetentionRow]) -> str:
    domains = len({row.evaluated_on for row in rows})
    tokens = sum({row.evaluated_on: row.tokens for row in rows}.values())
    return (
        f"{domains} domain{'s' if domains > 1 else ''}, {tokens:,} held-out tokens; dotted: the bound of the cliff; "
        f"selectivity: the rise on other domains less that on the own; {rows[0].versions}"
    )


Options, run = RetentionOptions, run_retention
