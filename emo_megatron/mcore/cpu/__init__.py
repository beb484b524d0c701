"""Stock Megatron-Core without CUDA: calls of torch.cuda are redirected to the CPU, and collectives run on gloo.

Megatron uses torch.cuda for streams, events, random states, memory figures and tensors, even if nothing is computed on
a GPU. `activate()` replaces each of these by a version that is correct for a CPU rank. Unmodified Megatron then trains
under every parallel layout with `--distributed-backend gloo --transformer-impl local`. `activate()` changes torch for
the whole process and must run before Megatron builds anything. With a GPU, `activate()` does nothing unless
EMO_DEVICE=cpu is set.
"""

from __future__ import annotations

import os

import torch
from torch.overrides import TorchFunctionMode

# stays active for the life of the process: without the mode Megatron would use cuda devices again
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
    """Redirect Megatron's CUDA calls to the CPU if `is_wanted()`; idempotent.

    Returns:
        Whether the redirection is active.
    """
    global _mode
    if not is_wanted():
        return False
    # Megatron uses torch.compile; compiling small graphs for a CPU takes minutes and gains nothing
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if _mode is None:
        from emo_megatron.mcore.cpu import redirect

        _mode = redirect.redirect()
        if int(os.environ.get("RANK", "0")) == 0:
            print("emo_megatron: no CUDA device in use, Megatron runs on the CPU over gloo", flush=True)
    return True


def with_cpu_flags(argv: list[str]) -> list[str]:
    """`argv`, in a CPU run with the necessary Megatron flags in front; flags of the caller take precedence."""
    return [*CPU_FLAGS, *argv] if is_active() else argv


def local_flags() -> list[str]:
    """Megatron's flags for a process without Transformer Engine and Apex, on a GPU or a CPU.

    Megatron's defaults need both packages. A CPU needs a few more flags: `with_cpu_flags`.
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
"""Megatron's flags for a run on a CPU."""
