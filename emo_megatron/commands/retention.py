"""The command retention: measure a model that keeps fewer experts, and write rows, table and figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from emo_megatron.commands.options import DataOptions, check_least, unset
from emo_megatron.experts.calibration import Calibration, Documents
from emo_megatron.experts.select import RANDOM, MaxLossIncrease, check_method, parse_keep, parse_size
from emo_megatron.files import must_be_writable, whole
from emo_megatron.json_files import read_object, read_own, to_json
from emo_megatron.report.figure import plot_methods
from emo_megatron.report.rows import RetentionRow, load_rows, rows_of, save_rows
from emo_megatron.report.table import find_smallest_sizes, full_report, methods_table, smallest_sizes_table
from emo_megatron.runners import cache, launch
from emo_megatron.runners.cache import CachedRunner
from emo_megatron.runners.retention import Condition, conditions, domain_files, measure_rows

FORMAT = "emo_megatron.rows.2"
FIRST_FORMAT = "emo_megatron.rows.1"
"""Named the validation documents held_out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Measure the loss increase of a model that keeps fewer experts, for every domain, method and size.

    The command writes a table, a figure and the numbers behind them. Random experts are always measured too. With
    several domains the table shows the selectivity: the loss increase of a module on other domains minus the increase
    on its own domain. The same command called again measures only what is missing.

    For example:
        emo_megatron retention --checkpoint runs/emo --data calibration --validation-data validation --keep 50% 25%
        --output runs/retention
    """

    checkpoint: Path
    """Megatron checkpoint (the folder of --save, or one iteration in the folder) or Hugging Face folder."""
    data: Path
    """Calibration documents: a file as for stats, or a folder with one file per domain."""
    validation_data: Path
    """Validation documents: a file, or a folder with files of the same names; must differ from --data."""
    output: Path
    """Folder for retention.csv, .json, .png and .txt; the files of an earlier call on the same model are replaced."""
    keep: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SIZE ...")] = ("50%", "25%", "12.5%")
    """Routed experts per layer: shares such as 25%, or numbers such as "8 routed". No value: only the whole model."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("mean_prob",)
    """Methods that choose the experts, as for select --method."""
    max_loss_increase: Annotated[str, tyro.conf.arg(metavar="BOUND")] = "1%"
    """Report the smallest size within this bound: a share of the loss such as 1%, or nats per token such as 0.05."""
    cross_sizes: Annotated[tuple[str, ...] | None, unset("SIZE ...", "all sizes of --keep")] = None
    """Sizes of --keep at which every module is also measured on other domains."""
    num_other_domains: Annotated[int | None, unset("INT", "all")] = None
    """Number of other domains on which a module is measured, in alphabetical order; 0 for none."""
    validation_tokens: Annotated[int | None, unset("INT", "no limit")] = None
    """Stop adding validation documents of a domain when this number of tokens is reached."""
    name: str = "model"
    """Name of the model in rows, table and figure. The names emo and standard are spelled out in the figure."""
    compare: Annotated[tuple[Path, ...], unset("PATH ...", "none")] = ()
    """retention.json files of other models, which are added to the table and the figure."""

    def __post_init__(self) -> None:
        # super() does not find the class that slots made anew
        DataOptions.__post_init__(self)
        check_least(self, 1, "validation_tokens")
        check_least(self, 0, "num_other_domains")
        MaxLossIncrease.parse(self.max_loss_increase)
        if not self.name.strip():
            raise ValueError("--name must not be empty")
        for size in self.keep:
            parse_size(size, num_experts=1)
        if self.keep and not self.methods:
            raise ValueError("--methods must name at least one method")
        for method in self.methods:
            check_method(method, flag="--methods")
        unmeasured = set(self.cross_sizes or ()) - set(self.keep)
        if unmeasured:
            raise ValueError(
                f"--cross-sizes must be sizes of --keep, written in the same way; got {', '.join(sorted(unmeasured))}"
            )
        if self.data.absolute() == self.validation_data.absolute():
            raise ValueError("--validation-data must differ from --data, which chooses the experts")


def run(options: Options) -> Path:
    """Measure, and print the table and the smallest sizes within the bound.

    Returns:
        The output folder: retention.csv and retention.json of this model, retention.txt and retention.png of this model
        and the models of --compare.
    """
    output = options.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder; got the file {output}")
    must_be_writable(output / "rows.json")
    _read_earlier(output / "rows.json")
    compared = _compared(options)
    if options.runs_in_ranks(options.checkpoint):
        options.run_in_ranks("retention", log=output / "retention.log")
    else:
        _measure(options)
        if launch.is_rank():
            return output
    _draw(options, _read(output / "rows.json")["rows"], compared)
    return output


def prepare(options: Options) -> tuple[CachedRunner, list[Condition], dict[str, Documents], dict[str, Documents]]:
    """Open the model and the documents; returns the first four arguments of `measure_rows`."""
    files = domain_files(options.data, options.validation_data)
    model, read = options.open(options.checkpoint, texts=[path for pair in files.values() for path in pair])
    metadata = model.metadata
    shape = {"num_experts": metadata.num_experts, "top_k": metadata.top_k}
    kept = {size: parse_keep(size, **shape) for size in options.keep}
    rows = conditions(
        list(files),
        num_experts=metadata.num_experts,
        methods=[method for method in dict.fromkeys(options.methods) if method != RANDOM],
        kept=list(dict.fromkeys(kept.values())),
        crossed=[kept[size] for size in (options.keep if options.cross_sizes is None else options.cross_sizes)],
        num_other_domains=options.num_other_domains,
    )
    calibration = {name: read(data, options.calibration) for name, (data, _) in files.items()}
    chosen = Calibration(num_tokens=options.validation_tokens)
    return model, rows, calibration, {name: read(text, chosen) for name, (_, text) in files.items()}


def _measure(options: Options) -> None:
    """Measure the rows, and write them to rows.json together with marks of the weights and the validation documents."""
    model, rows, calibration, validation_data = prepare(options)
    path = options.output / "rows.json"
    texts = {name: documents.source["sha256"] for name, documents in validation_data.items()}
    origin = {"weights": model.setting.weights, "validation_data": texts}
    model.from_writer(lambda: _check_same(path, origin))
    measured = measure_rows(model, rows, calibration=calibration, validation_data=validation_data, seed=options.seed)
    if model.is_writer:
        with whole(path) as unfinished:
            stored = {"format": FORMAT, **origin, "rows": measured}
            unfinished.write_text(to_json(stored, indent=1), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    kind = "a file of rows"
    if read_object(path, kind=kind).get("format") == FIRST_FORMAT:
        fields = ("weights", "held_out", "rows")
        stored = read_own(path, kind=kind, format=FIRST_FORMAT, fields=fields, made_by="retention")
        return stored | {"validation_data": stored.pop("held_out")}
    fields = ("weights", "validation_data", "rows")
    return read_own(path, kind=kind, format=FORMAT, fields=fields, made_by="retention")


def _read_earlier(path: Path) -> dict[str, Any] | None:
    """What an earlier call wrote; None if there was no earlier call."""
    try:
        return _read(path) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}; remove the file, or give another folder with --output") from None


def _check_same(path: Path, origin: dict[str, Any]) -> None:
    """Raise ValueError if rows.json holds rows of other weights or other validation documents."""
    if (stored := _read_earlier(path)) is None:
        return
    # the file may hold more domains
    texts = origin["validation_data"].items()
    is_same = all(stored["validation_data"].get(name, mark) == mark for name, mark in texts)
    if stored["weights"] != origin["weights"] or not is_same:
        raise ValueError(
            f"{path} holds rows of another model or other validation documents: give another folder with --output"
        )


def _draw(options: Options, measured: list[dict[str, Any]], compared: list[RetentionRow]) -> None:
    """Write the files of the output folder, and print the tables."""
    output, bound = options.output, MaxLossIncrease.parse(options.max_loss_increase)
    own = rows_of(measured, model=options.name, seed=options.seed, versions=versions())
    save_rows(own, output / "retention")
    rows = [*own, *compared]
    with whole(output / "retention.txt") as unfinished:
        unfinished.write_text(full_report(rows, bound), encoding="utf-8")
    plot_methods(rows, output / "retention.png", caption=_caption(own), bound=bound)
    found = find_smallest_sizes(rows, bound)
    means = [size for size in found if size.domain is None]
    print(methods_table(rows), end="\n\n\n")
    # with a single domain there is no mean over domains
    print(smallest_sizes_table(means or found, bound), end="\n\n")


def versions() -> str:
    """Versions of the packages that measured, as text."""
    found = cache.versions()
    return ", ".join(f"{name} {found[name]}" for name in ("emo_megatron", "torch", "megatron-core") if name in found)


def _compared(options: Options) -> list[RetentionRow]:
    rows = [row for path in options.compare for row in load_rows(path)]
    if any(row.model == options.name for row in rows):
        raise ValueError(f"--compare holds rows of a model with the name {options.name}: give another --name")
    return rows


def _caption(rows: list[RetentionRow]) -> str:
    domains = len({row.evaluated_on for row in rows})
    tokens = sum({row.evaluated_on: row.tokens for row in rows}.values())
    return (
        f"{domains} domain{'s' if domains > 1 else ''}, {tokens:,} validation tokens; dotted: --max-loss-increase; "
        f"selectivity: loss increase on other domains minus loss increase on the own domain; {rows[0].versions}"
    )
