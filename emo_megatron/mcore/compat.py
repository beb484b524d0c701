"""Differences between the supported versions of Megatron-Core, and the gate that refuses the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import torch

from emo_megatron.environment import BRIDGE_INSTALL, is_supported, supported_range


def require_megatron() -> tuple[int, int]:
    """The (major, minor) version of the installed Megatron-Core."""
    return _require("megatron-core", by="emo_megatron.mcore", install="pip install 'emo_megatron[megatron]'")


def require_bridge() -> tuple[int, int]:
    """The (major, minor) version of the installed Megatron-Bridge."""
    return _require("megatron-bridge", by="emo_megatron.bridge", install=BRIDGE_INSTALL)


def _require(distribution: str, *, by: str, install: str) -> tuple[int, int]:
    wanted = f"{distribution} {supported_range(distribution)}"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{by} needs {wanted}. Install it: {install}") from None
    if not is_supported(distribution, version):
        raise ImportError(f"{by} supports {wanted}; found {version}")
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def is_in_backward() -> bool:
    """Whether this forward runs inside autograd's backward, that is, recomputes activations.

    Megatron's checkpoint functions leave no mark of their own. The engine's task id is what torch's own checkpoint
    tests for the same purpose; -1 means no backward is running on this thread.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape stray percent signs in help texts: 0.19.2 has one, and argparse's --help fails on it."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%(?![(%])", "%%", re.sub(r"%%", "%", action.help))


def use_compiled_index_builder() -> None:
    """Let megatron.training start from the wheel.

    Every start runs `make` for the dataset's index builder, and exits when that fails; the wheel ships it compiled, and
    no Makefile.
    """
    import megatron.core.datasets.utils as dataset_utils

    utils: Any = dataset_utils
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def training_args() -> argparse.Namespace | None:
    """megatron.training's flags; None where it does not run, or has not parsed them yet.

    Its public get_args() fails there, and importing it here would make every user pay for it.
    """
    training = sys.modules.get("megatron.training.global_vars")
    return getattr(training, "_GLOBAL_ARGS", None)


def consumed_train_samples() -> int | None:
    """Training samples megatron.training has consumed before this step; None where it does not run."""
    args = training_args()
    return None if args is None else getattr(args, "consumed_train_samples", 0)
