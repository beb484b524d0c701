"""Differences between the supported versions of Megatron-Core, and the gate that refuses the others."""

from __future__ import annotations

import importlib.metadata

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
