"""Packed documents that context parallelism cuts one by one, for which each is padded to a length that can be cut.

The same tokens have three orders: *packed*, as the dataset gives them; *padded*, with padding behind every document,
which attention, rotary embedding and the rolls of multi-token prediction see; and a rank's part of the padded order.
Padding lies at the end of a document and attention is causal, so no token of the text can see it. Routers keep to the
packed order: what they draw for a document must not depend on how much padding the layout needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from emo_megatron.config import PoolCpPartition
from emo_megatron.sharding import local_token_indices

PACKING = "emo_packing"
"""Attribute of packed_seq_params, optional: the micro-batch's Packing, where it says more than the boundaries there."""


@dataclass(kw_only=True, eq=False)
class Packing:
    """Where documents lie in a whole micro-batch as it was packed: before any padding, and before any rank's cut."""

    cu_seqlens: Tensor
    """[D + 1] int32 or int64: boundaries in mbs * S tokens, sample after sample."""
    tokens_per_sample: int
    """S."""
    num_samples: int | None = None
    """mbs; None: as many as the tokens make, where no padding was put in later."""
    num_padding_B: Tensor | None = None
    """[mbs] int64: tokens of padding at the end of each sample. Boundaries count them to the last document, where
    attention does no harm by them; in the choice of a pool they would have a vote. None: there is none."""


def padding_multiple(*, cp_size: int, tp_size: int) -> int:
    """What a document's padded length is a multiple of: two pieces for each context-parallel rank.

    Args:
        cp_size: context-parallel ranks.
        tp_size: tensor-parallel ranks with sequence parallelism, which cut a rank's tokens further; else 1.
    """
    return 2 * cp_size * tp_size


def longest_padded(num_tokens: int, *, max_documents: int, multiple: int) -> int:
    """Tokens that a micro-batch of `num_tokens` in so many documents needs at most, padded: a fixed length for all."""
    most = num_tokens + max_documents * (multiple - 1)
    return -(-most // multiple) * multiple


def padded_bounds(cu_seqlens: Tensor, *, multiple: int, num_tokens: int | None = None) -> Tensor:
    """Boundaries after every document is padded to a multiple of `multiple`.

    Args:
        cu_seqlens: [D + 1] int32 or int64, as packed.
        multiple: see `padding_multiple`.
        num_tokens: a multiple of it, the padded length of the micro-batch; None: no longer than the documents.

    Returns:
        [D + 1] int64, or with `num_tokens` [D + 2]: what lies behind the last document is a piece of its own.
    """
    padded_D = (cu_seqlens.long().diff() + multiple - 1) // multiple * multiple
    ends_D = padded_D.cumsum(0)
    tail = [] if num_tokens is None else [ends_D.new_full((1,), num_tokens)]
    return torch.cat([ends_D.new_zeros(1), ends_D, *tail])


def packed_places(places_T: Tensor, cu_seqlens: Tensor, bounds: Tensor) -> Tensor:
    """Where tokens lay before their documents were padded.

    Args:
        places_T: [T] int64, in the padded order.
        cu_seqlens: [D + 1] int32 or int64, boundaries in the packed order.
        bounds: [D' + 1], D' >= D, boundaries in the padded order: document d lies from bounds[d] on.

    Returns:
        [T] int64 in the packed order, -1 for padding.
    """
    cu, bounds = cu_seqlens.long(), bounds.long()
    lengths_D = cu.diff()
    owner_T = torch.searchsorted(bounds[1:], places_T, right=True)
    safe_T = owner_T.clamp(max=len(lengths_D) - 1)
    within_T = places_T - bounds[safe_T]
    is_real_T = (owner_T < len(lengths_D)) & (within_T < lengths_D[safe_T])
    return torch.where(is_real_T, cu[safe_T] + within_T, -1)


def cut_by_document(
    batch: dict[str, Any],
    keys: tuple[str, ...],
    *,
    cu_seqlens: Tensor,
    bounds: Tensor,
    num_tokens: int,
    cp_rank: int,
    cp_size: int,
) -> dict[str, Any]:
    """A packed micro-batch padded by document, and of it what a context-parallel rank holds.

    Args:
        batch: `keys` -> [1, packed tokens] or None.
        keys: what to cut; the rest is returned as it is.
        cu_seqlens, bounds: boundaries in the packed and in the padded order.
        num_tokens: of the padded order.
        cp_rank, cp_size: this rank.

    Returns:
        `keys` -> [1, num_tokens / cp_size], 0 on padding, or None.
    """
    held_T = local_token_indices(
        num_tokens=num_tokens, cp_rank=cp_rank, cp_size=cp_size, document_bounds=bounds, device=bounds.device
    )
    places_T = packed_places(held_T, cu_seqlens, bounds)
    is_padding_T, safe_T = places_T < 0, places_T.clamp(min=0)
    cut = {key: batch[key][0, safe_T].masked_fill(is_padding_T, 0)[None] for key in keys if batch.get(key) is not None}
    return batch | cut


def packed_params(packing: Packing, *, longest: int, bounds: Tensor | None = None) -> PackedSeqParams:
    """A micro-batch's documents in the form Megatron's layers take; routers take the packing, which rides on it.

    Args:
        packing: with int32 boundaries.
        longest: tokens of the longest document, padding included.
        bounds: [D' + 1], where documents lie once they are padded; None: as packed.
    """
    attended = packing.cu_seqlens if bounds is None else bounds.int()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=attended,
        cu_seqlens_kv=attended,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=packing.tokens_per_sample if bounds is None else None,
    )
    setattr(packed, PACKING, packing)
    return packed


def over_all_tokens(
    loss: Tensor, num_tokens: Tensor, cp_group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """A context-parallel rank's summed loss and tokens, such that Megatron's mean of ranks is that over all tokens.

    Megatron divides each rank's loss by its tokens and averages over ranks, which may hold differently many.

    Args:
        loss: [], summed over this rank's tokens.
        num_tokens: [] int32, how many they are.

    Returns:
        The loss times the ranks, and the tokens of all of them.
    """
    of_all_ranks = num_tokens.clone()
    torch.distributed.all_reduce(of_all_ranks, group=cp_group)
    return loss * cp_group.size(), of_all_ranks


def require_padded(cu_seqlens: Tensor, bounds: Tensor, *, num_tokens: int) -> None:
    """Check boundaries of both orders against each other; waits for device tensors."""
    lengths_D, room_D = cu_seqlens.diff(), bounds.diff()
    num_documents = len(lengths_D)
    if len(room_D) < num_documents or (room_D[:num_documents] < lengths_D).any():
        raise ValueError(
            f"cu_seqlens_q must give every document of {PACKING} at least its length; got room for {room_D.tolist()} "
            f"and documents of {lengths_D.tolist()} tokens"
        )
    if bounds[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens_q must end at or before the {num_tokens} tokens of all ranks; got {int(bounds[-1])}: the "
            "batch was cut differently"
        )


def partition_bounds(packed: PackedSeqParams, partition: PoolCpPartition) -> Tensor | None:
    """[D + 1], where the documents lie that context parallelism cuts one by one; None if it cuts whole samples.

    A host that says how it cut decides (Megatron's `dev` branch: cp_partition_mode), and `partition` otherwise.
    """
    mode = getattr(packed, "cp_partition_mode", None)
    if mode not in (None, "zigzag"):
        raise ValueError(f"--cp-partition-mode must be zigzag, two pieces of each document per rank; got {mode!r}")
    if mode is None and partition == "sample":
        return None
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded
