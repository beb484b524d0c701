"""Differences between the supported versions of Megatron-Core, and the gate that refuses the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import re

import torch

SUPPORTED = "megatron-core >= 0.18, < 0.20"


def require_megatron() -> tuple[int, int]:
    """The (major, minor) version of the installed Megatron-Core.

    Raises:
        ImportError: Megatron-Core is missing or its version is outside the supported range.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"emo_megatron.mcore needs {SUPPORTED}. Install it: pip install 'emo_megatron[megatron]'"
        ) from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if not (0, 18) <= (major, minor) < (0, 20):
        raise ImportError(f"emo_megatron.mcore supports {SUPPORTED}; found {version}")
    return major, minor


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
