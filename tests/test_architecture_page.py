"""docs/architecture.md and its pictures name only files, classes and functions that exist; the pictures are current."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emo_megatron"
DOCS = ROOT / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
OF_MEGATRON = {"PackedSeqParams", "routing", "forward", "cu_seqlens", "seq_aux_loss", "aux_loss"}
"""Code on the page that is Megatron's."""
NOT_IN_PACKAGE = {"csrc/", "emo_megatron/"}
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?")


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


@functools.cache
def _defined(path: Path) -> frozenset[str]:
    """Classes, functions, methods and constants that a file defines; the file is not imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def _problems(text: str) -> Iterator[str]:
    """Files and names in code style that do not exist. The names of a table row with one file must be of that file."""
    everywhere = frozenset[str]().union(*(_defined(path) for path in PACKAGE.rglob("*.py")))
    for line in text.splitlines():
        code = [name for name in re.findall(r"`([^`]+)`", line) if name not in OF_MEGATRON | NOT_IN_PACKAGE]
        paths = [PACKAGE / name for name in code if re.fullmatch(r"[\w/]+(\.py|/)", name)]
        yield from (f"{path}: no such file" for path in paths if not path.exists())
        is_about_one = line.startswith("|") and len(paths) == 1 and paths[0].is_file()
        known = _defined(paths[0]) if is_about_one else everywhere
        for name in filter(NAME.fullmatch, code):
            # other words of lower case are commands
            is_name = is_about_one or "_" in name or not name.islower()
            if is_name and name not in known and PACKAGE / name not in paths:
                yield f"{name}: not defined in {paths[0] if is_about_one else PACKAGE}"


def test_everything_on_the_page_exists() -> None:
    assert list(_problems(PAGE)) == []


@pytest.mark.parametrize(
    "line",
    [
        "Read `mcore/no_such_file.py` first.",
        "| scope | `mcore/context.py` | `PoolRouter` |",
        "| top-k | `ops/reference.py` | `pool_topk2` |",
        "`PoolMoELayer.no_such_method` runs.",
    ],
)
def test_what_does_not_exist_is_found(line: str) -> None:
    assert len(list(_problems(line))) == 1


def _missing(page: str) -> Iterator[str]:
    """Paths from the root that do not exist, and names X of "`X` in `PATH`" or "`PATH` (`X` ...)" not in PATH."""
    for path in re.findall(r"`([\w.]+/[\w./]*)`", page):
        if not (ROOT / path).exists() and "NAME" not in path:
            yield path
    pairs = re.findall(r"`(\w+)` (?:in|to|of)\s`([\w/]+\.py)`", page)
    pairs += [(name, path) for path, name in re.findall(r"`([\w/]+\.py)`\s\(`(\w+)`", page)]
    for name, path in pairs:
        if (ROOT / path).is_file() and not re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")):
            yield f"{name} in {path}"


def test_recipes_of_contributing_name_what_exists() -> None:
    assert list(_missing((DOCS / "CONTRIBUTING.md").read_text(encoding="utf-8"))) == []
    wrong = (
        "`X1` in `emo_megatron/cli.py`, `tests/no.py`, and\n"
        "`tests/test_cli.py` (`test_no` runs); `COMMANDS` in\n`emo_megatron/cli.py`"
    )
    assert list(_missing(wrong)) == ["tests/no.py", "X1 in emo_megatron/cli.py", "test_no in tests/test_cli.py"]


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_everything_in_a_picture_exists(name: str) -> None:
    picture = SCRIPT.PICTURES[name]
    assert 8 <= len(picture.boxes) <= 12
    for box in picture.boxes.values():
        if box.path:
            assert set(box.names) <= _defined(PACKAGE / box.path), box.title
            assert f"`{box.path}`" in PAGE, box.title
        else:
            assert not box.names, box.title
    for start, end, heads in picture.arrows:
        assert heads in ("", "both")
        # a wide box has more places than its first one
        assert start in picture.boxes
        assert end in picture.boxes or picture.boxes[end[0], 0].columns > end[1]


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_committed_pictures_are_current(name: str) -> None:
    picture, committed = SCRIPT.PICTURES[name], (DOCS / name).read_text(encoding="utf-8")
    texts = [element.text for element in ElementTree.fromstring(committed).iter("{http://www.w3.org/2000/svg}text")]
    labels = [label for box in picture.boxes.values() for label in box.labels]
    assert set(labels) <= set(texts), "run python docs/draw_architecture.py"
    assert committed == SCRIPT.draw(picture), "run python docs/draw_architecture.py"
    assert f"]({name})" in PAGE


@pytest.mark.parametrize("name", SCRIPT.PICTURES)
def test_labels_fit_their_boxes(name: str) -> None:
    for box in SCRIPT.PICTURES[name].boxes.values():
        width = box.columns * SCRIPT.BOX_WIDTH - 22
        # 7.5 pixels per character of the fixed-width font, about 6.5 of the other
        assert 7.5 * len(", ".join(box.names)) <= width, box.title
        assert 6.5 * len(box.text) <= width, box.title
