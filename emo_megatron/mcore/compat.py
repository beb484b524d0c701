"""Differences between the supported versions of Megatron-Core, and the check of the installed version."""

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
    """The (major, minor) version of the installed Megatron-Core; ImportError if the version is not supported."""
    return _require("megatron-core", by="emo_megatron.mcore", install="pip install 'emo_megatron[megatron]'")


def require_bridge() -> tuple[int, int]:
    """The (major, minor) version of the installed Megatron-Bridge; ImportError if the version is not supported."""
    return _require("megatron-bridge", by="emo_megatron.bridge", install=BRIDGE_INSTALL)


def _require(distribution: str, *, by: str, install: str) -> tuple[int, int]:
    wanted = f"{distribution} {supported_range(distribution)}"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{by} needs {wanted}, which is not installed: {install}") from None
    if not is_supported(distribution, version):
        raise ImportError(f"{by} supports {wanted}; {version} is installed: {install}")
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def is_in_backward() -> bool:
    """Whether this forward pass runs inside autograd's backward, to recompute activations.

    Megatron's checkpoint functions set no flag. torch's own checkpoint function checks the engine's task id for the
    same purpose; -1 means that no backward is running on this thread.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def repair_help(parser: argparse.ArgumentParser) -> None:
    """Escape stray percent signs in help texts; argparse's --help fails on them. Megatron-Core 0.19.2 has one."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%(?![(%])", "%%", re.sub(r"%%", "%", action.help))


def use_compiled_index_builder() -> None:
    """Let megatron.training start from the wheel.

    megatron.training runs `make` for the dataset's index builder at every start, and exits if `make` fails. The wheel
    contains the compiled index builder, but no Makefile.
    """
    import megatron.core.datasets.utils as dataset_utils

    utils: Any = dataset_utils
    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


def training_args() -> argparse.Namespace | None:
    """The parsed flags of megatron.training; None if megatron.training is not in use, or has not parsed them yet.

    The public get_args() raises an error in these cases, and importing megatron.training here would slow down imports.
    """
    training = sys.modules.get("megatron.training.global_vars")
    return getattr(training, "_GLOBAL_ARGS", None)


def consumed_train_samples() -> int | None:
    """Training samples that megatron.training consumed before this step; None if megatron.training is not in use."""
    args = training_args()
    return None if args is None else getattr(args, "consumed_train_samples", 0)
