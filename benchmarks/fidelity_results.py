"""The results of one call of fidelity.py as a file, and results of other models from folders and archives."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401

from demo.recipe import differences
from emo_megatron.files import whole
from emo_megatron.json_files import from_json, to_json
from emo_megatron.report.rows import EMO, SMALL, STANDARD, RetentionRow, with_present_names

FORMAT = "emo_megatron.fidelity.1"
MODELS = (STANDARD, EMO, SMALL)
PREFIX = "fidelity-"
LARGEST = 8 << 20
"""Bytes of a result that is read."""

type Documents = dict[str, list[float]]
"""Domain -> a number of each validation document, always in the same order."""


@dataclass(kw_only=True)
class Result:
    """One model: how it was trained, and what was measured of it so far."""

    model: str
    settings: dict[str, Any]
    """What must be equal in two models that are compared: size and steps, tokens, seed, corpus."""
    machine: dict[str, str]
    corpus: dict[str, Any]
    plan: dict[str, Any]
    """Steps planned and chosen, and the speed that chose them."""
    stages: list[str] = field(default_factory=list)
    """What is done, in its order."""
    is_finished: bool = False
    step_seconds: float | None = None
    """Mean of the whole training."""
    tokens_per_second: float | None = None
    """Of training, on a GPU."""
    curve: list[tuple[int, float | None]] = field(default_factory=list)
    """Iteration, training loss."""
    document_tokens: Documents = field(default_factory=dict)
    """Predicted tokens."""
    nats: dict[str, Documents] = field(default_factory=dict)
    """`condition` -> summed nats."""
    early: dict[str, float] = field(default_factory=dict)
    """Domain -> loss of the whole model at the earlier checkpoint."""
    rows: list[RetentionRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all.

        Raises:
            ValueError: a number in it is not finite.
        """
        text = to_json({"format": FORMAT} | asdict(self))
        with whole(path) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def parse(cls, text: bytes) -> Result:
        """The result in a file.

        Raises:
            ValueError: it is none, or holds a number that is not finite.
        """
        try:
            stored = dict(from_json(text))
            if stored.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            if stored.keys() != {f.name for f in fields(cls)} or stored["model"] not in MODELS:
                raise ValueError("it has other fields or another model")
            stored["rows"] = [RetentionRow(**with_present_names(row)) for row in stored["rows"]]
            return cls(**stored)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it is no result of fidelity.py: {error!r}") from None


def condition(method: str, num_kept: int) -> str:
    """Names what was measured: which experts, chosen how."""
    return f"{method} {num_kept}"


@dataclass(frozen=True, kw_only=True)
class Partner:
    """What was found of another model.

    Attributes:
        result: the best one: comparable, if any is; then the one with most stages, then the newest.
        place: its file.
        differing: what hinders the comparison; empty if nothing does.
    """

    result: Result
    place: str
    differing: tuple[str, ...]


def find_partners(folder: Path | None, *, model: str, settings: dict[str, Any]) -> dict[str, Partner]:
    """Results of the other models below a folder, also inside archives.

    Args:
        folder: None finds nothing. What cannot be read there is passed over.
        model: whose partners are sought.
        settings: of that model, or the part of them that is known.
    """
    wanted = json.loads(json.dumps(settings))
    found: dict[str, Partner] = {}
    for place, text in _texts(folder) if folder else ():
        try:
            result = Result.parse(text)
        except ValueError:
            continue
        if result.model == model:
            continue
        partner = Partner(
            result=result,
            place=place,
            differing=tuple(
                f"{name} is {was} there and {now} here" for name, was, now in differences(result.settings, wanted)
            ),
        )
        if result.model not in found or _rank(found[result.model]) < _rank(partner):
            found[result.model] = partner
    return found


def _rank(partner: Partner) -> tuple[bool, int, str]:
    result = partner.result
    return (not partner.differing, len(result.stages), result.machine.get("date", ""))


def _texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Place and content of every file that may be a result."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        if _is_result(path.name) and path.stat().st_size <= LARGEST:
            yield str(path), path.read_bytes()
        elif path.name.endswith((".tgz", ".tar.gz")):
            yield from _members(path)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The same of an archive, of which nothing is unpacked; one that is cut short gives what it has."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if not member.isfile() or not _is_result(Path(member.name).name) or member.size > LARGEST:
                    continue
                file = archive.extractfile(member)
                if file is not None:
                    yield f"{path}:{member.name}", file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        return


def _is_result(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith(".json")
