"""Every command with odd arguments: it does what they say, or tells in one line which flag or file is wrong.

What would start a process, load a model or write a checkpoint stops the command instead, with what it was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import stat
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro
from fuzz.judge import both_sizes, check_line, fuzz
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from emo_megatron import cli

VALID: dict[str, str] = {
    "stats": "--checkpoint megatron --data text.jsonl --output new",
    "merge-stats": "--stats stats.safetensors other.safetensors --output new",
    "select": "--stats stats.safetensors --keep '3 routed' --output new",
    "retention": "--checkpoint megatron --data text.jsonl --validation-data held.jsonl --output new --keep '3 routed'",
    "extract": "--checkpoint megatron --selection selection3.json --output new",
    "compose": "--selections selection2.json selection3.json --keep '3 routed' --stats stats.safetensors "
    "stats.safetensors --output new",
    "merge": "--parent megatron --modules module --output new",
    "place": "--stats stats.safetensors --ranks 2 --output new",
    "reorder": "--checkpoint megatron --placement placement.json --output new",
    "export": "--checkpoint megatron --output new --format gguf --mtp drop --parity-tokens 0",
    "import": "--folder qwen2_moe --adapter adapter --output new",
    "eval-task": "--documents text.jsonl --name held --model qwen2_moe --output new",
}
"""Arguments that are right, of every command, with the files of `write_inputs`."""
PATHS = (
    *("new", "new/deep/file.json", "missing", "text.jsonl", "held.jsonl", "tokens.safetensors", "indexed"),
    *("stats.safetensors", "other.safetensors", "selection2.json", "selection3.json", "placement.json"),
    *("retention.json", "retention.csv", "qwen2_moe", "emo", "megatron", "module", "adapter"),
    *("megatron/release", "text.jsonl/under", "", ".", "..", "-dash", "x" * 300, "é\u2028[1]*?%"),
)
NUMBERS = (
    *("1", "2", "4", "0", "-1", "8", "100", "0.5", "1.0", "1e3", "nan", "inf", "-inf", "1e999", "5e-324"),
    *(str(2**63), "1" + "0" * 30, "", " ", "none", "None", "x", "\u0663", "0x10", "1_0", "--seed"),
)
TEXTS = (
    *(
        "",
        " ",
        "french",
        "model",
        "none",
        "None",
        "1%",
        "0.05",
        "25%",
        "4",
        "4 routed",
        "-5",
        "nan%",
        "inf",
        "1e999%",
        "0%",
    ),
    *("parent", "average", "owner", "module", "mean_prob", "é\u2028", "a\nb", "a'b", "--output", "-x", "a b"),
    *("--seq-length 8", "--load x", "{}", "a/b", "..", "x" * 300),
)


KNOWN = {
    "stats": (
        *("--megatron-args none", "--megatron-args=None", "--megatron-args a'b", "--examples 0", "--tokens 0"),
        *("--shots -1", "--seed -1", f"--seed {2**64}"),
    ),
    "merge-stats": ("--stats", "--stats other.safetensors other.safetensors"),
    "select": ("--keep x", "--keep 4", "--keep nan%", f"--method random --seed {2**64}"),
    "retention": ("--name none", "--keep=-x", "--max-loss-increase nan"),
    "extract": ("--checkpoint module",),
    "merge": ("--modules", "--blend nan", "--parent module"),
    "place": ("--stats", "--ranks 8", "--seed -1", "--max-imbalance nan", "--max-imbalance 0"),
    "reorder": ("--checkpoint module",),
    "export": ("--shard-gb nan", "--shard-gb=-inf", "--shard-gb 0"),
    "eval-task": ("--num-tokens 0", f"--name {'x' * 300}"),
}
"""Faults that were found: what is set in right arguments."""


class Reached(BaseException):
    """A command came to what a test does not do; the arguments are those of the call."""


def reach(*arguments: Any, **_: Any) -> typing.NoReturn:
    raise Reached(*arguments)


@pytest.fixture
def folder(valid: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The valid files as the current folder, and every costly step stopped."""
    stops = {
        "subprocess": "Popen",
        "emo_megatron.runners.huggingface": "load_hugging_face",
        "emo_megatron.checkpoint.writer": "_save",
        "emo_megatron.commands.export": "measure_parity",
        "emo_megatron.hf.adapter": "_merge",
        "emo_megatron.commands.retention": "plot_methods",
    }
    monkeypatch.chdir(valid)
    for module, name in stops.items():
        monkeypatch.setattr(importlib.import_module(module), name, reach)
    return valid


def options_of(command: str) -> Any:
    name = command.replace("-", "_") + ("_" if command == "import" else "")
    return importlib.import_module(f"emo_megatron.commands.{name}").Options


def values(kind: Any) -> SearchStrategy[list[str]]:
    """Texts for a field of this type: right ones, and others."""
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=3).map(
            lambda found: [value for values in found for value in values]
        )
    if kind is bool:
        return st.just([])
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from((*typing.get_args(kind), "", "other")).map(lambda value: [value])
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    texts = {Path: PATHS, int: NUMBERS, float: NUMBERS, str: TEXTS}[kind]
    return st.sampled_from(texts).map(lambda value: [value])


def groups(arguments: str) -> list[list[str]]:
    """Every flag with its values."""
    return [flag.split() for flag in re.split(r" (?=--)", arguments)]


@st.composite
def arguments(draw: DrawFn, valid: str, kinds: dict[str, Any]) -> list[str]:
    """Right arguments with one to three flags set to something else, taken away, repeated or unknown."""
    found = groups(valid)
    for _ in range(draw(st.integers(1, 3))):
        flag = draw(st.sampled_from(list(kinds)))
        way = draw(st.sampled_from(("set", "set", "set", "set", "join", "drop", "repeat", "bare", "unknown")))
        if way in ("set", "join", "drop"):
            found = [group for group in found if group[0] != flag]
        if way in ("set", "repeat"):
            found.append([flag, *draw(values(kinds[flag]))])
        elif way == "join":
            found += [[f"{flag}={value}"] for value in draw(values(kinds[flag]))]
        elif way == "bare":
            found.append([flag])
        elif way == "unknown":
            found.append([draw(st.sampled_from(("--unknown", "stray", "--", "-h", flag[:-1])))])
    return [argument for group in found for argument in group]


def kinds_of(options: type, *, prefix: str = "--") -> dict[str, Any]:
    """Flag -> type of every field."""
    hints = typing.get_type_hints(options)
    return {prefix + f.name.replace("_", "-"): hints[f.name] for f in dataclasses.fields(options)}


def state_of(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Every path below -> size and time of a file."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (of.st_size, of.st_mtime_ns) if stat.S_ISREG(of.st_mode) else None for path, of in found.items()}


def check_files(folder: Path, before: dict[Path, tuple[int, int] | None]) -> list[Path]:
    """Files and folders that are new, which are removed; those that were there are as they were."""
    now = state_of(folder.parent)
    new = sorted(now.keys() - before.keys())
    for path in reversed(new):
        path.rmdir() if path.is_dir() else path.unlink()
    assert {path: now.get(path) for path in before} == before
    left = [path for path in new if path.name.endswith((".unfinished", ".partial", ".tmp"))]
    assert not left, left
    return new


def run(argv: list[str]) -> tuple[int, str, Reached | None]:
    """Exit status, standard error, and what it came to."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code, reached = 0, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Reached as stop:
            reached = stop
    err.seek(0)
    return code, err.read(), reached


def check(argv: list[str], *, folder: Path) -> None:
    """Run a command and judge how it ended."""
    before = state_of(folder.parent)
    code, told, reached = run(argv)
    new = check_files(folder, before)
    if reached is not None:
        check_step(argv, reached)
        return
    check_end(argv, code, told, new=new)


def check_end(argv: list[str], code: int, told: str, *, new: list[Path]) -> None:
    """A result and no error, or an error and no result."""
    assert code in (0, 2), (code, told)
    if code == 0:
        assert "error: " not in told
        assert new or "-h" in argv or "--help" in argv
        return
    assert not new, new
    check_error(argv, told)


def check_error(argv: list[str], told: str) -> None:
    """One error, which names a flag or something that was given."""
    assert "Traceback" not in told
    line = told[told.rfind("error: ") :]
    values = {value for argument in argv[1:] for value in argument.split("=", 1)}
    # a path of nothing is told as the current folder, and the system's errors escape what cannot be printed
    given = [" .", "'.'"] if values & {"", "."} else []
    given += [text for value in values if len(value) > 1 for text in (value, repr(value)[1:-1])]
    if line.startswith("error: "):
        assert told.count("error: ") == 1, told
        flags = re.findall(r"--[a-z][\w-]+", line)
        check_line(line.rstrip("\n"), named=[*flags, *given])
        return
    box = "\n".join(row for row in told.splitlines() if "--help" not in row)
    assert re.search(r"--[a-z]", box) or any(value in box for value in given), told


def check_step(argv: list[str], reached: Reached) -> None:
    """A process that is started gets the options as they were given."""
    if not reached.args or not isinstance(reached.args[0], list):
        return
    command = [str(part) for part in reached.args[0]]
    options = options_of(argv[0])
    got, wanted = (
        tyro.cli(options, args=given, config=(tyro.conf.FlagCreatePairsOff,))
        for given in (command[command.index("emo_megatron") + 2 :], argv[1:])
    )
    for field in dataclasses.fields(options):
        one, other = getattr(got, field.name), getattr(wanted, field.name)
        assert plain(one) == plain(other), (field.name, one, other)


def plain(value: Any) -> Any:
    """A value without what may differ: paths are made absolute."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.absolute() if isinstance(value, Path) else repr(value)


@both_sizes
# nearly all that bridge takes are fields of Megatron-Bridge, which is not in this environment: tests/bridge
@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("bridge", "env")])
def test_commands(command: str, inputs: int, folder: Path) -> None:
    kinds = kinds_of(options_of(command))
    known = [VALID[command].split()]
    for change in KNOWN.get(command, ()):
        flag = re.split("[ =]", change)[0]
        kept = [group for group in groups(VALID[command]) if group[0] != flag]
        known.append([argument for group in (*kept, change.split()) for argument in group])
    drawn = arguments(VALID[command], kinds)
    fuzz(inputs, drawn, lambda argv: check([command, *argv], folder=folder), known=known)
