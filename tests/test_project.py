"""The project around the package: make, build, contract, and what no file may hold."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from emo_megatron.environment import SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_OURS = {".git", ".hypothesis", ".venv", "build", "dist", "runs"}
MAX_LINES = 350
CANDIDATES = ("python3.12", "python3.13", "python3")


def _files() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name for name in folders if name not in NOT_OURS and not name.endswith(("cache", "cache__", ".egg-info"))
        ]
        found += [Path(folder) / name for name in names if name != ".git" and not name.startswith(".coverage")]
    return found


def _make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_alone_lists_every_target() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    listed = set(re.findall(r"^  make (\S+) ", _make().stdout, re.MULTILINE))
    assert listed == set(targets.group(1).split())
    assert {"setup", "demo", "test", "test-all", "lint", "types", "bench", "clean"} <= listed


def _executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_make_setup_takes_another_torch() -> None:
    command = ["make", "--dry-run", "setup", "TORCH=torch==2.13.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'pip install --disable-pip-version-check "torch==2.13.0"' in done.stdout


@pytest.mark.parametrize("works", ["bin/python3.13", "bin/python3", "home/.pyenv/versions/3.12.1/bin/python"])
def test_make_finds_an_interpreter_by_running_it(tmp_path: Path, works: str) -> None:
    for name in CANDIDATES:
        _executable(tmp_path / "bin" / name, "echo 'pyenv: command not found' >&2; exit 127")
    _executable(tmp_path / "home/.pyenv/versions/3.11.7/bin/python", "exit 1")
    _executable(tmp_path / works, f'exec "{sys.executable}" "$@"')
    done = _make(
        "--eval",
        'find: ; @$(FIND_PYTHON); echo "found $$python"',
        "find",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        HOME=str(tmp_path / "home"),
    )
    found = Path(done.stdout.removeprefix("found ").strip())
    assert found.name == Path(works).name, done


def test_make_says_what_to_install_without_an_interpreter(tmp_path: Path) -> None:
    for name in CANDIDATES:
        _executable(tmp_path / "bin" / name, "exit 127")
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = _make("setup", cwd=tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", HOME=str(tmp_path))
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert len(errors) == 1
    assert "no Python 3.12 or 3.13" in errors[0]
    assert not (tmp_path / ".venv").exists()


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
