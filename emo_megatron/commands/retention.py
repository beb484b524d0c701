"""The command retention: measure a model with fewer experts, then write rows, table and figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_megatron.commands.options import DataOptions, check_least
from emo_megatron.experts.calibration import Calibration, Documents
from emo_megatron.experts.select import RANDOM, MaxRise, check_method, parse_keep, size_of
from emo_megatron.files import must_be_writable, whole
from emo_megatron.json_files import read_own, to_json
from emo_megatron.report.figure import plot_methods
from emo_megatron.report.rows import RetentionRow, load_rows, rows_of, save_rows
from emo_megatron.report.table import cliffs_table, find_cliffs, full_report, methods_table
from emo_megatron.runners import cache, launch
from emo_megatron.runners.cache import Measured
from emo_megatron.runners.retention import Condition, conditions, domain_files, measure_rows

FORMAT = "emo_megatron.rows.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Measure what a model loses with fewer experts, by domain, method and number of experts, and find the cliff.

    Beside every rise stand the loss, as many random experts and, with several domains, the selectivity: how much more
    a domain's experts cost on other domains than on their own. Called again, it measures what is missing.
    """

    checkpoint: Path
    """The model, as for `stats`."""
    data: Path
    """Calibration documents, as for `stats`; or a folder with such a file for every domain."""
    held_out: Path
    """Documents that choose no experts: a file, or a folder with files of the same names."""
    output: Path
    """Folder for retention.csv, .json, .png and .txt; those of an earlier call on the same weights and text are
    replaced."""
    keep: tuple[str, ...] = ("50%", "25%", "12.5%")
    """Sizes to try, each as for `select`: experts a layer, the shared ones included, or a share of all; --keep without
    a size measures the whole model alone."""
    methods: tuple[str, ...] = ("mean_prob",)
    """What chooses the experts, as for `select`. Random experts are always measured beside."""
    max_rise: str = "1%"
    """The cliff is the smallest size from all experts down that stays within: a share of the loss, or nats a token."""
    cross: tuple[str, ...] | None = None
    """Of the sizes, those whose modules are also tried on other domains; all by default."""
    elsewhere: int | None = None
    """Other domains that a module is tried on, the next ones by name; all by default, 0 for none."""
    held_out_tokens: int | None = None
    """No further held-out document of a domain is taken once so many tokens are."""
    name: str = "model"
    """Names the model in rows, table and figure; emo and standard are drawn in their colours."""
    beside: tuple[Path, ...] = ()
    """retention.json of other models, to stand in the same table and figure."""

    def __post_init__(self) -> None:
        # super() does not find the class that slots made anew
        DataOptions.__post_init__(self)
        check_least(self, 1, "held_out_tokens")
        check_least(self, 0, "elsewhere")
        MaxRise.parse(self.max_rise)
        if not self.name.strip():
            raise ValueError("--name must name the model")
        for size in self.keep:
            size_of(size, total=1)
        if self.keep and not self.methods:
            raise ValueError("--methods must name at least one method")
        for method in self.methods:
            check_method(method, flag="--methods")
        unmeasured = set(self.cross or ()) - set(self.keep)
        if unmeasured:
            raise ValueError(f"--cross must be sizes of --keep, written alike; got {', '.join(sorted(unmeasured))}")
        if self.data.absolute() == self.held_out.absolute():
            raise ValueError("--held-out must be documents that choose no experts: not --data")


def run(options: Options) -> Path:
    """Measure, and print table and cliffs.

    Returns:
        The output folder, with retention.csv and retention.json of this model, and retention.txt and retention.png of
        this one and those beside.
    """
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder; {output} is a file")
    must_be_writable(output / "rows.json")
    _read_earlier(output / "rows.json")
    beside = _beside(options)
    if options.is_elsewhere(options.checkpoint):
        options.run_elsewhere("retention", log=output / "retention.log")
    else:
        _measure(options)
        if launch.is_rank():
            return output
    _draw(options, _read(output / "rows.json")["rows"], beside)
    return output


def prepare(options: Options) -> tuple[Measured, list[Condition], dict[str, Documents], dict[str, Documents]]:
    """Open the model and the documents: what `measure_rows` takes."""
    files = domain_files(options.data, options.held_out)
    model, read = options.open(options.checkpoint, texts=[path for pair in files.values() for path in pair])
    facts = model.facts
    kept = {size: parse_keep(size, facts) for size in options.keep}
    rows = conditions(
        list(files),
        num_experts=facts.num_experts,
        methods=[method for method in dict.fromkeys(options.methods) if method != RANDOM],
        kept=list(dict.fromkeys(kept.values())),
        crossed=[kept[size] for size in (options.keep if options.cross is None else options.cross)],
        elsewhere=options.elsewhere,
    )
    calibration = {name: read(data, options.calibration) for name, (data, _) in files.items()}
    chosen = Calibration(num_tokens=options.held_out_tokens)
    return model, rows, calibration, {name: read(text, chosen) for name, (_, text) in files.items()}


def _measure(options: Options) -> None:
    """Write rows.json: what `report.rows_of` reads, and what it was measured on."""
    model, rows, calibration, held_out = prepare(options)
    path = options.output / "rows.json"
    texts = {name: documents.source["sha256"] for name, documents in held_out.items()}
    origin = {"weights": model.setting.weights, "held_out": texts}
    model.from_writer(lambda: _check_same(path, origin))
    measured = measure_rows(model, rows, calibration=calibration, held_out=held_out, seed=options.seed)
    if model.is_writer:
        with whole(path) as unfinished:
            stored = {"format": FORMAT, **origin, "rows": measured}
            unfinished.write_text(to_json(stored, indent=1), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return read_own(
        path, kind="a file of rows", format=FORMAT, fields=("weights", "held_out", "rows"), made_by="retention"
    )


def _read_earlier(path: Path) -> dict[str, Any] | None:
    """What an earlier call wrote, if there was one."""
    try:
        return _read(path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or name another folder with --output") from None


def _check_same(path: Path, origin: dict[str, Any]) -> None:
    """Refuse to write over rows of something else."""
    if (stored := _read_earlier(path)) is None:
        return
    # of other domains there may be some more
    texts = origin["held_out"].items()
    is_same = all(stored["held_out"].get(name, mark) == mark for name, mark in texts)
    if stored["weights"] != origin["weights"] or not is_same:
        raise ValueError(f"{path} holds rows of another model or other text; name another folder with --output")


def _draw(options: Options, measured: list[dict[str, Any]], beside: list[RetentionRow]) -> None:
    """Write and print what was measured."""
    output, bound = options.output, MaxRise.parse(options.max_rise)
    own = rows_of(measured, model=options.name, seed=options.seed, versions=versions())
    save_rows(own, output / "retention")
    rows = [*own, *beside]
    with whole(output / "retention.txt") as unfinished:
        unfinished.write_text(full_report(rows, bound), encoding="utf-8")
    plot_methods(rows, output / "retention.png", caption=_caption(own), bound=bound)
    means = [cliff for cliff in find_cliffs(rows, bound) if cliff.domain is None]
    print(methods_table(rows), end="\n\n\n")
    # of a single domain there is no mean
    print(cliffs_table(means or find_cliffs(rows, bound), bound), end="\n\n")


def versions() -> str:
    """What measures, for people."""
    found = cache.versions()
    return ", ".join(f"{name} {found[name]}" for name in ("emo_megatron", "torch", "megatron-core") if name in found)


def _beside(options: Options) -> list[RetentionRow]:
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
