"""Megatron without Transformer Engine and Apex: the flags that choose its modules in plain PyTorch."""

from __future__ import annotations


def local_flags() -> list[str]:
    """Megatron's flags for a process without Transformer Engine and Apex, on a GPU or a CPU.

    Megatron's defaults ask for both. A CPU needs a few flags more: `emo_megatron.mcore.cpu.with_cpu_flags`.
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
