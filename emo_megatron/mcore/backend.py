"""Which routing ops a router runs."""

from __future__ import annotations

import functools
from typing import Any

import torch

from emo_megatron import ops


def choose_backend(
    device_type: str, *, num_experts: int, top_k: int, dtype: torch.dtype, num_groups: int = 0
) -> ops.Backend:
    """The best backend for such logits. Rank 0 says, once a reason, why it is not the compiled one."""
    backend = ops.best_backend(device_type, num_experts, top_k, dtype, num_groups)
    if backend == "reference":
        limits: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "dtype": dtype}
        _tell(ops.why_not_native(device_type, **limits, num_groups=num_groups))
    return backend


@functools.cache
def _tell(reason: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(f"emo_megatron: routing runs in plain PyTorch, which is slower: {reason}", flush=True)
