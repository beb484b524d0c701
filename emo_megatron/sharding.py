"""Which tokens of a micro-batch a rank's routers see, under tensor/sequence and context parallelism.

Mirrors how Megatron cuts batches and hidden states. Flat indices count the whole micro-batch in packed order: sample
0's tokens, then sample 1's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def local_token_indices(
    *,
    num_tokens: int,
    batch_size: int = 1,
    tp_rank: int = 0,
    tp_size: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens of the micro-batch a rank's router sees, in the order the router flattens them.

    Context-parallel rank r holds chunks r and 2 * cp_size - 1 - r of each sample's 2 * cp_size, the
    load-balanced zigzag; sequence parallelism splits the rest contiguously; hidden states are
    [s, b, h], so flattening puts position before sample. A packed stream is one sample.

    Args:
        num_tokens: T of the whole micro-batch.
        batch_size: B; 1 for a packed stream, whatever samples it was packed from.
        tp_rank, tp_size: tensor-parallel rank and size under sequence parallelism, else 0 and 1.
        cp_rank, cp_size: context-parallel rank and size.
        device: of the result.

    Returns:
        [T / (tp_size * cp_size)] int64 flat indices in packed order.

    Raises:
        ValueError: the tokens do not divide evenly, or a rank does not lie in [0, size).
    """
    num_chunks = 2 * cp_size if cp_size > 1 else 1
    _check_layout("tp", tp_rank, tp_size)
    _check_layout("cp", cp_rank, cp_size)
    sequence = divide_exactly(
        num_tokens, batch_size, "num_tokens", "batch_size", "Pad the samples."
    )
    chunk = divide_exactly(
        sequence, num_chunks, "the sequence length", "2 * cp_size", "Change --seq-length."
    )
    per_rank = divide_exactly(
        sequence // cp_size,
        tp_size,
        "the sequence length per context-parallel rank",
        "tp_size",
        "Change --seq-length.",
    )
    held = (cp_rank, num_chunks - 1 - cp_rank) if cp_size > 1 else (0,)
    position_S = torch.cat([torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in held])
    position_S = position_S[tp_rank * per_rank : (tp_rank + 1) * per_rank]
    sample_B = torch.arange(batch_size, device=device)
    return (position_S[:, None] + sample_B * sequence).reshape(-1)


def _check_layout(name: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(
            f"{name}_rank must lie in [0, {name}_size); got rank {rank} of size {size}. Take both "
            "from one process group."
        )


def divide_exactly(value: int, by: int, value_name: str, by_name: str, remedy: str) -> int:
    """value / by, or a ValueError that names both and says what to do."""
    if value < 0 or by < 1 or value % by:
        raise ValueError(
            f"{value_name} must be a multiple of {by_name} = {by}; got {value}. {remedy}"
        )
    return value // by
