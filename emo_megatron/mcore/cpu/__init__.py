"""Stock Megatron-Core without CUDA: its calls into torch.cuda answered on the CPU, its collectives on gloo.

Megatron asks torch.cuda for streams, events, random states, memory figures and tensors even where nothing is computed
there. `activate()` gives each of those an answer that is true of one CPU rank, so the unmodified Megatron, with
`--distributed-backend gloo --transformer-impl local`, trains under every parallel layout. It changes torch for the
whole process and must run before Megatron builds anything; it does nothing where a GPU exists, unless EMO_DEVICE=cpu.
"""

from __future__ import annotations

import os

import torch
from torch.overrides import TorchFunctionMode

# kept for the life of the process: leaving the mode would hand cuda devices back to Megatron
_mode: TorchFunctionMode | None = None


def is_wanted() -> bool:
    """Whether this process should run Megatron on the CPU: no CUDA device, or EMO_DEVICE=cpu."""
    device = os.environ.get("EMO_DEVICE", "")
    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"EMO_DEVICE must be cpu, cuda or unset; got {device!r}")
    return device == "cpu" or (device == "" and (is_active() or not torch.cuda.is_available()))


def is_active() -> bool:
    """Whether torch.cuda is redirected in this process."""
    return _mode is not None


def activate() -> bool:
    """Redirect Megatron's CUDA calls to the CPU where `is_wanted()`; idempotent.

    Returns:
        Whether the redirection is active.
    """
    global _mode
    if not is_wanted():
        return False
    # Megatron decorates with torch.compile; compiling small CPU graphs costs minutes and gains nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if _mode is None:
        from emo_megatron.mcore.cpu import redirect

        _mode = redirect.redirect()
        if int(os.environ.get("RANK", "0")) == 0:
            print("emo_megatron: no CUDA device in use, Megatron runs on the CPU over gloo", flush=True)
    return True


def with_cpu_flags(argv: list[str]) -> list[str]:
    """`argv` with the Megatron flags a CPU run needs in front, where it is one; flags of the caller win."""
    return [*CPU_FLAGS, *argv] if is_active() else argv


def local_flags() -> list[str]:
    """Megatron's flags for a process without Transformer Engine and Apex, on a GPU or a CPU.

    Megatron's defaults ask for both. A CPU needs a few flags more: `with_cpu_flags`.
    """
    return [
        *("--transformer-impl", "local"),
        *("--attention-backend", "unfused"),
        "--no-gradient-accumulation-fusion",
        "--no-masked-softmax-fusion",
        "--no-bias-dropout-fusion",
        "--no-bias-swiglu-fusion",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
    ]


CPU_FLAGS = (*("--distributed-backend", "gloo"), *local_flags(), "--use-cpu-initialization", "--no-bias-gelu-fusion")
"""Megatron's flags for a CPU."""
