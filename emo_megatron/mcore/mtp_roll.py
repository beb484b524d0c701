"""Megatron's roll of packed documents for multi-token prediction, of all documents at once.

Megatron goes through documents one by one, with two slices and, under context parallelism, up to four messages each,
for every tensor of every depth. Here a roll is a few operations and one collective of the documents' first tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from torch import Tensor

_host: Any = multi_token_prediction
_HOST_ROLL = getattr(_host, "_roll_tensor_packed_seq", None)
_HOST_PARAMETERS = ("tensor", "shifts", "dims", "packed_seq_params", "cp_group")


def use_packed_roll() -> None:
    """Let Megatron roll packed documents with `roll_packed`; a version that calls its own otherwise is left alone."""
    if _HOST_ROLL is not None and tuple(inspect.signature(_HOST_ROLL).parameters) == _HOST_PARAMETERS:
        _host._roll_tensor_packed_seq = roll_packed


def roll_packed(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every document's tokens one place to the left, with 0 behind its last: values and sum of Megatron's roll.

    Args:
        tensor: [..., T / cp_size], this rank's tokens, of any dtype. What lies behind the last document stays.
        shifts: -1.
        dims: the last dimension.
        packed_seq_params: cu_seqlens_q [D + 1] are the documents of all ranks, which may be empty. With context
            parallelism each length is a multiple of 2 * cp_size and rank r holds pieces r and 2 * cp_size - 1 - r of
            every document (sharding.py); cut in another way (cp_partition_mode), Megatron's own roll is called.
        cp_group: of context parallelism; None: of one rank.

    Returns:
        The rolled tensor, and its sum.
    """
    mode = getattr(packed_seq_params, "cp_partition_mode", None)
    if shifts != -1 or dims not in (-1, tensor.dim() - 1) or mode not in (None, "zigzag"):
        assert _HOST_ROLL is not None
        rolled: tuple[Tensor, Tensor] = _HOST_ROLL(tensor, shifts, dims, packed_seq_params, cp_group)
        return rolled
    bounds = packed_seq_params.cu_seqlens_q.long()
    num_local = tensor.shape[-1]
    if num_local == 0 or len(bounds) < 2:
        return tensor.clone(), tensor.sum()
    cp_size = 1 if cp_group is None else cp_group.size()
    if cp_size == 1:
        bounds = bounds.clamp(max=num_local)
        next_P = tensor.new_zeros(*tensor.shape[:-1], len(bounds) - 1)
    else:
        bounds = _piece_bounds(bounds, cp_size).clamp(max=num_local)
        next_P = _first_of_next_piece(tensor[..., bounds[:-1].clamp(max=num_local - 1)], cp_group)
    place_T = torch.arange(num_local, device=tensor.device)
    # an empty piece ends where the one before it does, so that no token is found in it
    piece_T = torch.searchsorted(bounds[1:], place_T, right=True).clamp(max=len(bounds) - 2)
    is_last_T = bounds[1:][piece_T] == place_T + 1
    moved = torch.where(is_last_T, next_P[..., piece_T], tensor.roll(-1, dims=-1))
    moved = torch.where(place_T < bounds[-1], moved, tensor)
    return moved, moved.sum()


def _piece_bounds(bounds: Tensor, cp_size: int) -> Tensor:
    """[2 D + 1] int64: where the two pieces that a rank holds of each document lie among its tokens."""
    if bounds.device.type == "cpu" and (bounds % (2 * cp_size)).any():
        raise ValueError(
            f"documents cut over {cp_size} context-parallel ranks must have lengths that are multiples of "
            f"{2 * cp_size}; got boundaries {bounds.tolist()} in cu_seqlens_q. Pad the documents."
        )
    local = bounds // cp_size
    middle_D = (local[:-1] + local[1:]) // 2
    return torch.cat([torch.stack([local[:-1], middle_D], dim=1).flatten(), local[-1:]])


def _first_of_next_piece(first_P: Tensor, cp_group: Any) -> Tensor:
    """[..., 2 D]: the token behind each of this rank's pieces, 0 behind a document's last; `first_P` are their first.

    Ranks 0 .. cp_size - 1 hold the pieces of a document's first half in order, and those of its second half in
    reverse: behind a first piece lies the next rank's, and behind a second piece that of the rank before.
    """
    rank, size = cp_group.rank(), cp_group.size()
    # as bytes, because not every backend gathers every dtype
    sent = first_P.contiguous().view(torch.uint8)
    received = sent.new_empty(size * sent.shape[0], *sent.shape[1:])
    dist.all_gather_into_tensor(received, sent, group=cp_group)
    first_RP = received.view(first_P.dtype).view(size, *first_P.shape)
    behind_first_D = first_RP[rank + 1, ..., ::2] if rank < size - 1 else first_RP[rank, ..., 1::2]
    behind_second_D = first_RP[rank - 1, ..., 1::2] if rank > 0 else torch.zeros_like(behind_first_D)
    return torch.stack([behind_first_D, behind_second_D], dim=-1).flatten(-2)
