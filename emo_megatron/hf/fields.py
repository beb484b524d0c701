"""The fields of a config.json, each of the type that its name promises; an error tells the field and what it holds."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from emo_megatron.json_files import is_a

MOST = 2**31 - 1
"""No size of a model is larger."""


def whole_number(config: Mapping[str, Any], name: str, *, least: int = 1, default: int | None = None) -> int:
    """A size or a count.

    Args:
        config: of the file.
        name: of the field.
        least: smallest that can be.
        default: of a field that is not given, or null; None: it must be given.

    Raises:
        ValueError: it is missing or something else.
    """
    value = _given(config, name, default)
    if not is_a(value, int) or not least <= value <= MOST:
        raise _wrong(name, f"a whole number, {least} or more", value)
    return int(value)


def whole_numbers(config: Mapping[str, Any], name: str, *, default: list[int], below: int = MOST + 1) -> list[int]:
    """Counts in [0, below).

    Raises:
        ValueError: it is something else.
    """
    value = _given(config, name, default)
    if not isinstance(value, list) or not all(is_a(n, int) and 0 <= n < below for n in value):
        raise _wrong(name, f"a list of whole numbers in [0, {below})", value)
    return value


def number(config: Mapping[str, Any], name: str, *, of: str = "") -> float:
    """A number above 0.

    Args:
        config: of the file, or an object in it.
        name: of the field.
        of: the field with that object, for the error.

    Raises:
        ValueError: it is missing or something else.
    """
    value = _given(config, name, None)
    if not is_a(value, float) or value <= 0:
        raise _wrong(f"{of}.{name}".lstrip("."), "a number above 0", value)
    return float(value)


def switch(config: Mapping[str, Any], name: str, *, default: bool, of: str = "") -> bool:
    """True or false; `of` as for `number`.

    Raises:
        ValueError: it is something else.
    """
    value = _given(config, name, default)
    if not isinstance(value, bool):
        raise _wrong(f"{of}.{name}".lstrip("."), "true or false", value)
    return value


def record(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object, empty where it is not given.

    Raises:
        ValueError: it is something else.
    """
    value = _given(config, name, {})
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is None and default is None:
        raise ValueError(f"config.json must give {name}; it does not")
    return default if value is None else value


def _wrong(name: str, wanted: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {wanted}; got {reprlib.repr(value)}")
