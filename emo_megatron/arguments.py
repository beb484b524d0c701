"""Command-line arguments before they are parsed: names of earlier releases, suggestions for misspelt names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

RENAMED_COMMANDS = {"relabel": "reorder"}
RENAMED_FLAGS = {
    "--beside": "--compare",
    "--cross": "--cross-sizes",
    "--elsewhere": "--num-other-domains",
    "--held-out": "--validation-data",
    "--held-out-tokens": "--validation-tokens",
    "--max-rise": "--max-loss-increase",
    "--megatron": "--megatron-args",
    "--processes": "--nproc-per-node",
    "--rows": "--micro-batch-size",
}
RENAMED_VALUES = {("place", "--method", "together"): "coactivation"}
"""Old names -> present names. Old names print a warning; the next release removes them."""
SIZES = ("--keep", "--cross-sizes")
"""Flags whose values may be a number of routed experts, "8 routed"."""


def new_command(name: str, known: Collection[str]) -> str:
    """The present name of a command; ValueError with the nearest name if there is no such command."""
    if name in RENAMED_COMMANDS:
        _warn(name, RENAMED_COMMANDS[name])
        return RENAMED_COMMANDS[name]
    if name not in known:
        raise ValueError(f"there is no command {name}{nearest(name, known)}; emo_megatron --help lists the commands")
    return name


def current_arguments(command: str, arguments: Sequence[str], options: Any) -> list[str]:
    """Arguments of a command with the present names of flags and values.

    Args:
        command: its present name.
        arguments: what follows the name of the command.
        options: the dataclass of its options.

    Raises:
        ValueError: an old and the new name of a flag are both given, or a flag is unknown; names the nearest flag.
    """
    flags = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(options)
        if "Positional" not in str(field.type)
    }
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = {_split(argument)[0] for argument in arguments[:end]}
    found: list[str] = []
    flag = ""
    for place, argument in enumerate(arguments):
        if argument == "--":
            # no flags follow
            return [*found, *arguments[place:]]
        name, value = _split(argument)
        if name in RENAMED_FLAGS and name not in flags and (new := RENAMED_FLAGS[name]) in flags:
            if new in given:
                raise ValueError(f"{name} is the old name of {new}: give {new} only")
            _warn(name, new)
            name = new
        if name and name not in {*flags, "--help"} and not name.startswith("--tyro-"):
            hint = nearest(name, flags)
            if command == "bridge" and name.startswith("--pool-"):
                hint = f", give model.{name[2:].replace('-', '_')}=VALUE"
            raise ValueError(f"{command} has no flag {name}{hint}; emo_megatron {command} --help lists the flags")
        flag = name or flag
        before = found[-1] if found else ""
        if argument == "routed" and flag in SIZES and re.search(r"(^|=)\d+$", before):
            # --keep 8 routed, without quotation marks
            found[-1] = f"{before} routed"
        elif not name:
            found.append(_current_value(command, before, argument))
        elif value is None:
            found.append(name)
        else:
            found.append(f"{name}={_current_value(command, name, value)}")
    return found


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error that asks whether the nearest known name was meant; empty if no known name is similar."""
    # without dashes, which would make all flags similar
    names = {k.lstrip("-"): k for k in sorted(known)}
    word = name.lstrip("-")
    # a flag that was cut short is nearest to the flags that it begins
    similar = [k for k in names if len(word) > 1 and k.startswith(word)]
    similar += difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f", did you mean {names[similar[0]]}?" if similar else ""


def suggest_flags(parser: argparse.ArgumentParser) -> None:
    """Let the error about unknown flags of a parser name the nearest flag that the parser has."""
    report, known = parser.error, parser._option_string_actions

    def error(message: str) -> NoReturn:
        before, colon, words = message.partition("unrecognized arguments: ")
        unknown = [word.partition("=")[0] for word in words.split() if word.startswith("--")]
        hints = [f"{name}{hint}" for name in unknown if (hint := nearest(name, known))]
        report("; ".join([message, *hints]) if colon and not before else message)

    # argparse calls the method of the instance
    parser.error = error  # type: ignore[method-assign]


def _split(argument: str) -> tuple[str, str | None]:
    """The flag of an argument and the value after its equals sign; no flag for other arguments."""
    name, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w-]*", name):
        return "", None
    # the parser takes both spellings
    return name.replace("_", "-"), value if equals else None


def _current_value(command: str, flag: str, value: str) -> str:
    new = RENAMED_VALUES.get((command, flag, value))
    if new is None:
        return value
    _warn(f"{flag} {value}", f"{flag} {new}")
    return new


def _warn(old: str, new: str) -> None:
    print(f"warning: {old} is now called {new}; the next release removes the old name", file=sys.stderr, flush=True)
