"""Properties of the machine: GPU, tools, compiled library, Python packages. Needs only the standard library."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "emo_megatron" / "_native.so"
WHEELS = {
    "megatron-core": "megatron.core",
    "tyro": "tyro",
    "typeguard": "typeguard",
    "docstring-parser": "docstring_parser",
}
"""Distributions that a bare PyTorch image lacks, and the modules they install."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first one that nvidia-smi lists."""

    name: str
    arch: str
    """Compute capability without its dot; empty without a GPU."""


def find_gpu() -> Gpu | None:
    """The GPU, if nvidia-smi is there and lists one."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    name, comma, capability = (done.stdout.splitlines() or [""])[0].rpartition(",")
    return Gpu(name=name.strip(), arch=capability.strip().replace(".", "")) if comma else None


def tool_path() -> str:
    """PATH with the places of CUDA's tools, in the order in which setup.py looks for nvcc."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin" if home else "", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return os.pathsep.join(place for place in places if place)


def has_module(name: str) -> bool:
    """Whether a module could be imported; only its parents are."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def lacking_wheels() -> list[str]:
    """Distributions of WHEELS that this Python cannot import."""
    return [name for name, module in WHEELS.items() if not has_module(module)]


def why_lacking(need: str) -> str:
    """Why a step that needs this cannot run; empty where it can.

    Args:
        need: a tool's name, `pytest` for what the tests import, or `wheels`.
    """
    if need == "wheels":
        lacking = lacking_wheels()
        return f"this Python lacks {', '.join(lacking)}: bring wheels, --wheels" if lacking else ""
    if need == "pytest":
        lacking = [name for name in ("pytest", "hypothesis") if not has_module(name)]
        return f"this Python lacks {', '.join(lacking)}" if lacking else ""
    return "" if shutil.which(need, path=tool_path()) else f"there is no {need}"


def wheels_in(folder: Path) -> dict[str, Path]:
    """Distribution to file, of every wheel in a folder."""
    return {_normal(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}


def unpack(wheels: dict[str, Path], site: Path) -> None:
    """Unpack those that this Python does not have into a folder for PYTHONPATH; nothing is installed."""
    for name, path in wheels.items():
        if not _is_installed(name):
            with zipfile.ZipFile(path) as file:
                file.extractall(site)


def commit_of(root: Path) -> str:
    """What git says, or unknown: a copied tree has no history."""
    git = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
