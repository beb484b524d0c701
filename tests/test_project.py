"""The project around the package: make, build, contract, and what no file may hold."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

from emo_megatron.environment import SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_OURS = {".git", ".hypothesis", ".venv", "build", "dist", "runs"}
MAX_LINES = 350


def _files() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name not in NOT_OURS and not name.endswith(("cache", "cache__", ".egg-info"))
        ]
        found += [Path(folder) / name for name in names if name != ".git" and not name.startswith(".coverage")]
    return found


def test_make_alone_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    told = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=False)
    listed = set(re.findall(r"^  make (\S+) ", told.stdout, re.MULTILINE))
    assert listed == set(targets.group(1).split())


def test_supported_versions_are_those_of_pyproject() -> None:
    project = PYPROJECT["project"]
    asked = [
        f"python{project['requires-python']}",
        *project["dependencies"],
        *project["optional-dependencies"]["megatron"],
        *project["optional-dependencies"]["bridge"],
    ]
    for name, (first, end) in SUPPORTED.items():
        dotted = [".".join(map(str, release)) for release in (first, end) if release]
        expected = f"{name}>={dotted[0]}" + (f",<{dotted[1]}" if end else "")
        assert expected in asked


def test_the_contract_names_every_module() -> None:
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {name.strip(" ()") for layer in layers for name in layer.split("|")}
    package = ROOT / "emo_megatron"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert modules <= named


def test_no_file_names_a_path_of_one_machine() -> None:
    places = re.compile(r"(?<![\w.:])/(?:home|root|work|mnt|Users)/")
    for path in _files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for line in lines:
            assert not places.search(line), f"{path}: {line}"


def test_python_files_are_short_and_say_what_they_are_for() -> None:
    for path in _files():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        if path.relative_to(ROOT).parts[0] != "tests":
            assert text.count("\n") <= MAX_LINES, f"{path} is longer than {MAX_LINES} lines"
        assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
