"""A machine with a GPU and a bare PyTorch image, as far as scripts can tell: its packages, its tools, wheels to bring.

Nothing is simulated but what is absent: the steps' own Python runs, the compiled ops are the CPU's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "tests" / "data" / "device_packages.txt"
BROUGHT = ("megatron-core", "tyro", "typeguard", "docstring-parser")

# hides top-level modules, and the metadata of what installs them, in this Python's own folders and nowhere else
HIDE = """
import importlib.machinery, importlib.metadata, re, sys
HIDDEN_MODULES, HIDDEN_NAMES, FOLDERS = {modules!r}, {names!r}, {folders!r}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in HIDDEN_MODULES:
            path = [folder for folder in sys.path if folder not in FOLDERS]
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments):
        for found in super().find_distributions(*arguments):
            name = re.sub(r"[-_.]+", "-", found.name or "").lower()
            if not (name in HIDDEN_NAMES and str(found.locate_file("")) in FOLDERS):
                yield found

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""

NVIDIA_SMI = """
case "$*" in
*name,compute_cap*) echo "Some GPU 80GB, 9.0" ;;
*) echo "as asked: $*" ;;
esac
"""
# these refuse what needs rights on a machine that others use too, or what would hide errors
NCU = """
case "$*" in
*--import*) [ -f "$2" ] && echo "details of $2" && exit ;;
*"--clock-control none"*) ;;
*) echo "==ERROR== would lock the clocks: $*"; exit 9 ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
    --export) report=$2; shift 2 ;;
    --set | --clock-control | --kernel-name | --launch-count) shift 2 ;;
    --force-overwrite) shift ;;
    -*) echo "==ERROR== unknown option $1"; exit 9 ;;
    *) break ;;
    esac
done
"$@" && touch "$report.ncu-rep"
"""
COMPUTE_SANITIZER = """
[ "$1" = --tool ] && [ "$3 $4" = "--error-exitcode 3" ] || { echo "unknown options: $*"; exit 9; }
case "$2" in memcheck | racecheck | synccheck) ;; *) echo "unknown tool $2"; exit 9 ;; esac
[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || { echo "the caching allocator hides overruns"; exit 9; }
shift 4
exec "$@"
"""
# compilers that make a library by copying the one that is there
COMPILER = """
case "$*" in
*--list-gpu-arch*) echo compute_90; exit ;;
esac
for argument; do
    [ "$previous" = -o ] && output=$argument
    previous=$argument
done
case "$*" in
*-shared*) cp {library} "$output" ;;
*) echo "as asked: $NVCC_APPEND_FLAGS $*"; touch "$output" ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class DeviceMachine:
    """What a test passes on to gpu.sh."""

    environment: dict[str, str]
    wheels: Path


def make_machine(folder: Path, *, python: str) -> DeviceMachine:
    """A machine in a folder: tools, wheels, and an environment in which Python has what the image has."""
    tools, wheels, hook = (folder / name for name in ("tools", "wheels", "hook"))
    for path in (tools, wheels, hook):
        path.mkdir(parents=True)
    (hook / "sitecustomize.py").write_text(_hook())
    for name in BROUGHT:
        _pack(name, wheels)
    compiler = COMPILER.format(library=ROOT / "emo_megatron" / "_native.so")
    scripts = {"nvidia-smi": NVIDIA_SMI, "ncu": NCU, "compute-sanitizer": COMPUTE_SANITIZER}
    for name, script in (scripts | {"nvcc": compiler, "c++": compiler}).items():
        write_tool(tools / name, script)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "PYTHON": python,
        "PYTHONPATH": str(hook),
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return DeviceMachine(environment=environment, wheels=wheels)


def write_tool(path: Path, script: str) -> None:
    """An executable."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _hook() -> str:
    image = _with_dependencies(PACKAGES.read_text().split())
    installed = importlib.metadata.packages_distributions()
    modules = {module for module, names in installed.items() if not {_normal(n) for n in names} & image}
    names = {_normal(name) for found in installed.values() for name in found} - image
    folders = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    # as Python itself spells them, whichever link it was started by
    folders |= {os.path.realpath(folder) for folder in folders}
    return HIDE.format(modules=modules - {"sitecustomize"}, names=names, folders=folders)


def _with_dependencies(names: list[str]) -> set[str]:
    """Of the releases that are here, which may ask for others than the image's do."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found or name in BROUGHT:
            continue
        found.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needed = importlib.metadata.requires(name) or []
            names += [
                _normal(match.group())
                for line in needed
                if (match := re.match(r"[\w.-]+", line)) and "extra ==" not in line
            ]
    return found


def _pack(name: str, folder: Path) -> None:
    """The installed files of a distribution as a wheel."""
    found = importlib.metadata.distribution(name)
    target = folder / f"{name.replace('-', '_')}-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as file:
        for path in found.files or []:
            if ".." not in path.parts and path.suffix != ".pyc":
                file.write(str(path.locate()), str(path))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
