"""Options of the command retention, and which files hold the text of which domain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emo_megatron.commands.options import DataOptions, check_least
from emo_megatron.experts.calibration import Calibration
from emo_megatron.experts.select import METHODS, RANDOM, MaxRise, size_of

SUFFIXES = (".jsonl", ".safetensors", ".idx")
"""Of files with documents, the last one with a .bin beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionOptions(DataOptions):
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
    """Folder for retention.csv, .json, .png and .txt; it may hold what an interrupted call has measured."""
    keep: tuple[str, ...] = ("50%", "25%", "12.5%")
    """Sizes to try, each as for `select`: experts a layer, the shared ones included, or a share of all; --keep without
    a size measures the whole model alone."""
    methods: tuple[Literal["mean_prob", "frequency", "layerwise", "easy_ep", "reap", "random"], ...] = ("mean_prob",)
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
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise ValueError(f"--methods must be of {', '.join(METHODS)}; got {', '.join(sorted(unknown))}")
        unmeasured = set(self.cross or ()) - set(self.keep)
        if unmeasured:
            raise ValueError(f"--cross must be sizes of --keep, written alike; got {', '.join(sorted(unmeasured))}")
        if self.data.absolute() == self.held_out.absolute():
            raise ValueError("--held-out must be documents that choose no experts: not --data")

    @property
    def rows_file(self) -> Path:
        """Where rows are kept as they are measured."""
        return self.output / "rows.json"

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        """The methods that look at calibration documents."""
        return tuple(method for method in dict.fromkeys(self.methods) if method != RANDOM)

    @property
    def crossed(self) -> tuple[str, ...]:
        """The sizes whose modules are tried on other domains."""
        return self.keep if self.cross is None else self.cross

    @property
    def held_out_calibration(self) -> Calibration:
        """Which held-out documents."""
        return Calibration(num_tokens=self.held_out_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainFiles:
    """Where the text of a domain is."""

    calibration: Path
    held_out: Path


def domain_files(data: Path, held_out: Path) -> dict[str, DomainFiles]:
    """The files of each domain, which is named after its calibration file; by name.

    Args:
        data: a file or the prefix of an indexed dataset, or a folder of them.
        held_out: the same; a folder's files have the names of `data`'s.

    Raises:
        ValueError: a folder holds no documents, two files of one name, or other domains than the other folder.
    """
    if data.is_dir() != held_out.is_dir():
        raise ValueError(f"--data and --held-out must be two files or two folders; got {data} and {held_out}")
    if not data.is_dir():
        return {data.stem: DomainFiles(calibration=data, held_out=held_out)}
    files, others = _in_folder(data), _in_folder(held_out)
    if files.keys() != others.keys():
        raise ValueError(
            f"--data and --held-out must hold files of the same names; only one of {data} and {held_out} has "
            f"{', '.join(sorted(files.keys() ^ others.keys()))}"
        )
    return {name: DomainFiles(calibration=files[name], held_out=others[name]) for name in sorted(files)}


def _in_folder(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES:
            continue
        if path.stem in found:
            raise ValueError(f"{folder} holds two files of the domain {path.stem}; move one away")
        # an indexed dataset goes by its name without suffix
        found[path.stem] = path.with_suffix("") if path.suffix == ".idx" else path
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(SUFFIXES[:2])} or indexed dataset")
    return found
