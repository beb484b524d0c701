"""Dataclasses as flags of Megatron's parser: one flag a field, documented by the string under the field."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def prefixed(prefix: str) -> Callable[[str], str]:
    """`--PREFIX-` and a field's name as flags are written."""
    return lambda name: f"--{prefix}-{name}".replace("_", "-")


def add_fields(group: argparse._ActionsContainer, cls: type, *, flag: Callable[[str], str]) -> None:
    """Add a flag for every field of a dataclass: numbers, texts, paths, switches, choices, and tuples of them.

    Args:
        group: of the parser. A value is left under the flag's own name.
        cls: the dataclass; a field without default is required.
        flag: name of a field -> its flag.
    """
    types_of = typing.get_type_hints(cls)
    documentation = _field_documentation(cls)
    for field in dataclasses.fields(cls):
        is_required = field.default is dataclasses.MISSING
        options: dict[str, Any] = {"help": documentation[field.name]}
        options |= {"required": True} if is_required else {"default": field.default}
        kind = _plain_type(types_of[field.name])
        may_be_none = kind != types_of[field.name]
        if typing.get_origin(kind) is tuple:
            options["nargs"] = "*"
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            # of several values each is one, and a text may say "none"
            is_none_told = may_be_none and kind is not str and "nargs" not in options
            options["type"] = _none_or(kind) if is_none_told else kind
            options["metavar"] = kind.__name__.upper()
        group.add_argument(flag(field.name), **options)


def fields_of[T](args: argparse.Namespace, cls: type[T], *, flag: Callable[[str], str]) -> T:
    """The dataclass that the flags of `add_fields` describe."""
    values = {
        field.name: getattr(args, flag(field.name)[2:].replace("-", "_"))
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def flags_of(options: Any, *, flag: Callable[[str], str]) -> list[str]:
    """The flags of `add_fields` that describe this dataclass; those that are as by default are left out."""
    found: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or value is False:
            continue
        # paths whole: the command may run elsewhere
        values = [
            str(item.absolute()) if isinstance(item, Path) else str(item)
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        if value is True:
            found.append(flag(field.name))
        elif isinstance(value, tuple):
            found += [flag(field.name), *values]
        else:
            # one argument: a value may look like a flag
            found.append(f"{flag(field.name)}={values[0]}")
    return found


def _field_documentation(cls: type) -> dict[str, str]:
    """The string under each field, read from the source: one text serves reader and --help."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        found |= _own_documentation(base)
    return found


def _own_documentation(cls: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split()).replace("%", "%%")
    return found


def _plain_type(annotation: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _none_or(kind: Any) -> Any:
    """An argparse type that reads "none" as None."""

    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__
    return parse
