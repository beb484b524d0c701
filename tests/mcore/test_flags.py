"""Dataclasses as flags: what goes in comes out, and every kind of field has its form."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from emo_megatron.mcore.flags import add_fields, fields_of, flags_of, prefixed

FLAG = prefixed("some-step")


@dataclass(frozen=True, kw_only=True)
class Base:
    """Fields of a parent class."""

    text: str = ""
    """A text; 100% of it."""


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    """One field of each kind."""

    place: Path
    """A path."""
    places: tuple[Path, ...] = ()
    """Paths."""
    number: int | None = None
    """A number or none."""
    share: float = 0.5
    """A float."""
    is_on: bool = False
    """A switch."""
    kind: Literal["one", "two"] = "one"
    """A choice."""


def parser():
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_fields(made, Options, flag=FLAG)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": "--looks-like a flag", "number": 3, "share": 0.25, "is_on": True, "kind": "two"},
        {"places": (Path("/a"), Path("/b"))},
    ],
)
def test_what_goes_in_comes_out(changes):
    options = Options(place=Path("/here"), **changes)
    args = parser().parse_args(flags_of(options, flag=FLAG))
    assert fields_of(args, Options, flag=FLAG) == options


def test_paths_are_whole_because_the_command_may_run_elsewhere():
    args = parser().parse_args(flags_of(Options(place=Path("here")), flag=FLAG))
    assert fields_of(args, Options, flag=FLAG).place == Path.cwd() / "here"


def test_help_is_the_text_under_the_field_and_what_has_no_default_is_required(capsys):
    assert "A text; 100% of it." in parser().format_help()
    with pytest.raises(SystemExit):
        parser().parse_args([])
    assert "--some-step-place" in capsys.readouterr().err


def test_none_can_be_said():
    args = parser().parse_args(["--some-step-place", "/x", "--some-step-number", "none"])
    assert fields_of(args, Options, flag=FLAG).number is None
    args = parser().parse_args(["--some-step-place", "/x", "--some-step-places", "none", "/y"])
    assert fields_of(args, Options, flag=FLAG).places == (Path("none"), Path("/y"))
