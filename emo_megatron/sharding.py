"""The tokens of a micro-batch that one rank's routers see under tensor, sequence and context parallelism.

The functions reproduce Megatron's split of batches and hidden states. Flat indices count the tokens of the unsharded
micro-batch in packed order: the tokens of sample 0, then those of sample 1.
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
    document_bounds: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The tokens of the micro-batch that one rank's router sees, in the order in which the router flattens them.

    Context parallelism splits each sequence (each document with `document_bounds`) into 2 * cp_size chunks. Rank r
    holds chunks r and 2 * cp_size - 1 - r: the load-balanced zigzag. Sequence parallelism then splits the tokens of
    each context-parallel rank contiguously. Hidden states are [s, b, h], so the flat order is by position, then by
    sample. A packed stream is one sample.

    Args:
        num_tokens: T of the unsharded micro-batch.
        batch_size: B; 1 for a packed stream, however many samples it holds.
        tp_rank, tp_size: tensor-parallel rank and size under sequence parallelism, else 0 and 1.
        cp_rank, cp_size: context-parallel rank and size.
        document_bounds: [D + 1] integers from 0 to T, including padding: split a packed stream per document, like
            Transformer Engine. Every length is a multiple of 2 * cp_size. None: split per sample.
        device: device of the result.

    Returns:
        [T / (tp_size * cp_size)] int64 flat indices in packed order.
    """
    _check_layout("tp", tp_rank, tp_size)
    _check_layout("cp", cp_rank, cp_size)
    sequence = divide_exactly(num_tokens, batch_size, "num_tokens", "batch_size", "Pad the samples.")
    if document_bounds is None or cp_size == 1:
        position_S = _zigzag_by_sample(sequence, cp_rank=cp_rank, cp_size=cp_size, device=device)
    else:
        if batch_size != 1:
            raise ValueError(f"batch_size must be 1 with document_bounds; got {batch_size}")
        position_S = _zigzag_by_document(document_bounds.long(), sequence, cp_rank=cp_rank, cp_size=cp_size)
    per_rank = divide_exactly(
        sequence // cp_size, tp_size, "the sequence length per context-parallel rank", "tp_size", "Change --seq-length."
    )
    position_S = position_S[tp_rank * per_rank : (tp_rank + 1) * per_rank]
    sample_B = torch.arange(batch_size, device=device)
    return (position_S[:, None] + sample_B * sequence).reshape(-1)


def _zigzag_by_sample(sequence: int, *, cp_rank: int, cp_size: int, device: torch.device | str | None) -> Tensor:
    if cp_size == 1:
        return torch.arange(sequence, device=device)
    chunk = divide_exactly(sequence, 2 * cp_size, "the sequence length", "2 * cp_size", "Change --seq-length.")
    held = (cp_rank, 2 * cp_size - 1 - cp_rank)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk, device=device) for c in held])


def _zigzag_by_document(bounds: Tensor, sequence: int, *, cp_rank: int, cp_size: int) -> Tensor:
    length_D = bounds.diff()
    if bounds.device.type == "cpu" and (int(bounds[-1]) != sequence or bool((length_D % (2 * cp_size)).any())):
        raise ValueError(
            f"documents split over {cp_size} context-parallel ranks must have lengths that are multiples of "
            f"{2 * cp_size} and sum to {sequence} tokens; got boundaries {bounds.tolist()}. Pad the documents."
        )
    num_local = divide_exactly(sequence, cp_size, "the packed length", "cp_size", "Pad the documents.")
    # the output size is given to avoid a device synchronisation
    owner_S = torch.repeat_interleave(
        torch.arange(length_D.shape[0], device=bounds.device), length_D // cp_size, output_size=num_local
    )
    chunk_S = length_D[owner_S] // (2 * cp_size)
    within_S = torch.arange(num_local, device=bounds.device) - bounds[owner_S] // cp_size
    held_S = torch.where(within_S < chunk_S, cp_rank, 2 * cp_size - 2 - cp_rank)
    return bounds[owner_S] + held_S * chunk_S + within_S


def _check_layout(name: str, rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise ValueError(
            f"{name}_rank must be in [0, {name}_size); got rank {rank} of size {size}. Take both from the same "
            "process group."
        )


def divide_exactly(value: int, by: int, value_name: str, by_name: str, remedy: str) -> int:
    """value / by; a ValueError with both names and the remedy if there is a remainder."""
    if value < 0 or by < 1 or value % by:
        raise ValueError(f"{value_name} must be a multiple of {by_name} = {by}; got {value}. {remedy}")
    return value // by
