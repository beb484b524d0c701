"""JSON files: written with finite numbers, read strictly, and refused in one line with the file and the place."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"} | {
    dict: "an object",
    list: "a list",
}


def read_json(path: Path, *, kind: str) -> Any:
    """What a JSON file holds; `kind` is what it should be, with its article, for the error."""
    stored = path.read_bytes()
    try:
        return from_json(stored)
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: not readable JSON ({error})") from None


def from_json(stored: bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not JSON in UTF-8, a name stands twice in an object, a number is not finite.
    """
    if not stored.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(stored.decode(), object_pairs_hook=_object)
        _check_finite(value, place="")
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path, *, kind: str) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object."""
    stored = read_json(path, kind=kind)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not {kind}: it must hold an object; got {reprlib.repr(stored)}")
    return stored


def read_own(path: Path, *, kind: str, format: str, fields: Collection[str], made_by: str) -> dict[str, Any]:
    """The fields of a file that this package wrote; their types are the caller's to check.

    Args:
        path: of the file.
        kind: as in `read_json`.
        format: its "format", which ends in the number of its version.
        fields: names of all others.
        made_by: the command that writes such files.
    """
    stored = read_object(path, kind=kind)
    found = stored.pop("format", None)
    name, _, version = format.rpartition(".")
    if found != format and isinstance(found, str) and found.rpartition(".")[0] == name:
        raise ValueError(
            f"{path} has the format {found}, which another version of emo_megatron wrote; this one reads version "
            f"{version}: write the file again with {made_by}"
        )
    if found != format:
        raise ValueError(f'{path} is not {kind}: it lacks "format": "{format}"')
    if stored.keys() != set(fields):
        lacking, unknown = sorted(set(fields) - stored.keys()), sorted(stored.keys() - set(fields))
        raise ValueError(f"{path} is not {kind}: it lacks {lacking} and has unknown {unknown}")
    return stored


def checked(value: object, kinds: Mapping[str, type], *, where: str, least: int | None = None) -> dict[str, Any]:
    """`value`, if it is an object with these fields, each of its type; it may have more.

    Args:
        value: as JSON gives it.
        kinds: field -> str, int, float (which an int is, too), bool, list or dict.
        where: its file and place, for the error.
        least: of the whole numbers among them.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object; got {reprlib.repr(value)}")
    lacking = [name for name in kinds if name not in value]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    for name, kind in kinds.items():
        if not is_a(value[name], kind):
            raise ValueError(f"{where}: {name} must be {_WORDS[kind]}; got {reprlib.repr(value[name])}")
        if kind is int and least is not None and value[name] < least:
            raise ValueError(f"{where}: {name} must be {least} or more; got {value[name]}")
    return value


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON for a file."""
    return json.dumps(value, indent=indent, allow_nan=False)


def are_layers(numbers: Sequence[object]) -> bool:
    """Whether these are ascending numbers of layers, from 1."""
    positive = [n for n in numbers if isinstance(n, int) and is_a(n, int) and n > 0]
    return list(numbers) == sorted(set(positive))


def is_a(value: object, kind: type) -> bool:
    """Whether a JSON value has a type; no bool passes for a number, and an int passes for a float."""
    if type(value) is int and kind in (int, float):
        # others are no sizes, and do not fit a tensor or a float
        return -(2**63) <= value < 2**63
    return type(value) is kind


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{reprlib.repr(twice)} stands twice in an object")
    return found


def _check_finite(value: object, *, place: str) -> None:
    """Refuse NaN, Infinity and numbers that a float does not hold, which Python's reader takes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place.lstrip('.') or 'it'} is {value}, which is not a finite number")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_finite(item, place=f"{place}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_finite(item, place=f"{place}[{number}]")
