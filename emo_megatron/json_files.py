"""JSON files: finite numbers only, strict reading, and one-line errors that name the file and the place."""

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
    """The value in a JSON file. `kind` describes the expected file for errors, with an article: "a selection"."""
    stored = path.read_bytes()
    try:
        return from_json(stored)
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: not readable JSON ({error})") from None


def from_json(stored: bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: the text is not JSON in UTF-8, an object repeats a name, or a number is not finite.
    """
    if not stored.strip():
        raise ValueError("the text is empty")
    try:
        value = json.loads(stored.decode(), object_pairs_hook=_object)
        _check_finite(value, place="")
        return value
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def read_object(path: Path, *, kind: str) -> dict[str, Any]:
    """Like `read_json`, for a file that holds an object."""
    stored = read_json(path, kind=kind)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not {kind}: the file must hold an object; got {reprlib.repr(stored)}")
    return stored


def read_own(path: Path, *, kind: str, format: str, fields: Collection[str], made_by: str) -> dict[str, Any]:
    """The fields of a JSON file that this package wrote. The caller checks the types of the fields.

    Args:
        path: the file.
        kind: see `read_json`.
        format: the expected value of the field "format", which ends in a version number.
        fields: the names of all other fields.
        made_by: the command that writes such files.
    """
    stored = read_object(path, kind=kind)
    found = stored.pop("format", None)
    name, _, version = format.rpartition(".")
    if found != format and isinstance(found, str) and found.rpartition(".")[0] == name:
        raise ValueError(
            f"{path} has the format {found} of another version of emo_megatron; this version reads format "
            f"{version}: write the file again with {made_by}"
        )
    if found != format:
        raise ValueError(f'{path} is not {kind}: the file lacks "format": "{format}"')
    if stored.keys() != set(fields):
        lacking, unknown = sorted(set(fields) - stored.keys()), sorted(stored.keys() - set(fields))
        raise ValueError(f"{path} is not {kind}: it lacks the fields {lacking} and has the unknown fields {unknown}")
    return stored


def checked(value: object, kinds: Mapping[str, type], *, where: str, least: int | None = None) -> dict[str, Any]:
    """Return `value` if it is an object with the given fields and types; else raise. More fields are allowed.

    Args:
        value: value from JSON.
        kinds: field -> str, int, float (an int is accepted), bool, list or dict.
        where: file and place of `value`, for errors.
        least: smallest allowed value of the whole numbers.
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
    """JSON text for a file; a ValueError if a number is not finite."""
    return json.dumps(value, indent=indent, allow_nan=False)


def are_layers(numbers: Sequence[object]) -> bool:
    """Whether `numbers` are ascending layer numbers, all at least 1."""
    positive = [n for n in numbers if isinstance(n, int) and is_a(n, int) and n > 0]
    return list(numbers) == sorted(set(positive))


def is_a(value: object, kind: type) -> bool:
    """Whether a JSON value has the type `kind`. A bool is not a number; an int is accepted as a float."""
    if type(value) is int and kind in (int, float):
        # larger integers are not valid sizes, and may not fit into a tensor or a float
        return -(2**63) <= value < 2**63
    return type(value) is kind


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {reprlib.repr(twice)} twice")
    return found


def _check_finite(value: object, *, place: str) -> None:
    """Raise on NaN, Infinity and numbers too large for a float, which Python's JSON reader accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place.lstrip('.') or 'the value'} is {value}, which is not a finite number")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_finite(item, place=f"{place}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_finite(item, place=f"{place}[{number}]")
