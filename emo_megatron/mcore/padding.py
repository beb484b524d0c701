"""Packed documents that context parallelism cuts separately: each document is padded to a length that can be cut.

The tokens have three orders. *Packed* is the order in the dataset. *Padded* has padding after every document, and is
the order for attention, rotary embedding and the rolls of multi-token prediction. The third is a rank's part of the
padded order. Padding is at the end of a document and attention is causal, so no text token attends to padding. Routers
use the packed order, so that the pool size drawn for a document does not depend on the padding of the layout.
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
"""Optional attribute of packed_seq_params: the micro-batch's Packing, if the boundaries there are not enough."""


@dataclass(kw_only=True, eq=False)
class Packing:
    """Document boundaries of a whole micro-batch in the packed order: before padding and before ranks split tokens."""

    cu_seqlens: Tensor
    """[D + 1] int32 or int64: document boundaries in the mbs * S tokens, sample after sample."""
    tokens_per_sample: int
    """S, the number of tokens per sample."""
    num_samples: int | None = None
    """mbs; None: computed from the number of tokens, which is correct only without added padding."""
    num_padding_B: Tensor | None = None
    """[mbs] int64: padding tokens at the end of each sample; None: no padding. Boundaries count this padding as part of
    the last document. It does not affect attention, but would affect the choice of the pool."""


def padding_multiple(*, cp_size: int, tp_size: int) -> int:
    """The number that divides every document's padded length: each context-parallel rank needs two equal pieces.

    Args:
        cp_size: number of context-parallel ranks.
        tp_size: with sequence parallelism the number of tensor-parallel ranks, which split a rank's tokens; else 1.
    """
    return 2 * cp_size * tp_size


def longest_padded(num_tokens: int, *, max_documents: int, multiple: int) -> int:
    """Largest padded length of `num_tokens` tokens in up to `max_documents` documents: fits every micro-batch."""
    most = num_tokens + max_documents * (multiple - 1)
    return -(-most // multiple) * multiple


def padded_bounds(cu_seqlens: Tensor, *, multiple: int, num_tokens: int | None = None) -> Tensor:
    """Boundaries after every document is padded to a multiple of `multiple`.

    Args:
        cu_seqlens: [D + 1] int32 or int64, boundaries in the packed order.
        multiple: see `padding_multiple`.
        num_tokens: padded length of the micro-batch, divisible by `multiple`; None: the padded documents' length.

    Returns:
        [D + 1] int64; with `num_tokens` [D + 2], where the tokens after the last document are one further piece.
    """
    padded_D = (cu_seqlens.long().diff() + multiple - 1) // multiple * multiple
    ends_D = padded_D.cumsum(0)
    tail = [] if num_tokens is None else [ends_D.new_full((1,), num_tokens)]
    return torch.cat([ends_D.new_zeros(1), ends_D, *tail])


def packed_places(places_T: Tensor, cu_seqlens: Tensor, bounds: Tensor) -> Tensor:
    """Positions in the packed order of tokens that are given by positions in the padded order.

    Args:
        places_T: [T] int64, positions in the padded order.
        cu_seqlens: [D + 1] int32 or int64, boundaries in the packed order.
        bounds: [D' + 1], D' >= D, boundaries in the padded order: document d starts at bounds[d].

    Returns:
        [T] int64, positions in the packed order; -1 for padding.
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
    """A context-parallel rank's part of a packed micro-batch, after every document is padded.

    Args:
        batch: `keys` -> [1, packed tokens] or None.
        keys: entries to pad and cut; other entries are returned unchanged.
        cu_seqlens, bounds: boundaries in the packed and in the padded order.
        num_tokens: number of tokens in the padded order.
        cp_rank, cp_size: this rank and the number of context-parallel ranks.

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
    """A micro-batch's document boundaries for Megatron's layers, with the packing for routers as an attribute.

    Args:
        packing: with int32 boundaries.
        longest: number of tokens of the longest document, including padding.
        bounds: [D' + 1], boundaries in the padded order; None: documents are not padded.
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
    """A context-parallel rank's loss and token count, so that Megatron's mean over ranks is the mean over all tokens.

    Megatron divides each rank's loss by that rank's token count and averages over ranks, whose counts may differ.

    Args:
        loss: [], summed over this rank's tokens.
        num_tokens: [] int32, number of this rank's tokens.

    Returns:
        The loss times the number of ranks, and the token count of all ranks.
    """
    of_all_ranks = num_tokens.clone()
    torch.distributed.all_reduce(of_all_ranks, group=cp_group)
    return loss * cp_group.size(), of_all_ranks


def require_padded(cu_seqlens: Tensor, bounds: Tensor, *, num_tokens: int) -> None:
    """Check that packed and padded boundaries fit together; synchronises with the device."""
    lengths_D, room_D = cu_seqlens.diff(), bounds.diff()
    num_documents = len(lengths_D)
    if len(room_D) < num_documents or (room_D[:num_documents] < lengths_D).any():
        raise ValueError(
            f"cu_seqlens_q must have room for every document of {PACKING}; got room for {room_D.tolist()} tokens and "
            f"documents of {lengths_D.tolist()} tokens"
        )
    if bounds[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens_q must end at or before the {num_tokens} tokens of all ranks; got {int(bounds[-1])}: the "
            "batch was cut in another way"
        )


def partition_bounds(packed: PackedSeqParams, partition: PoolCpPartition) -> Tensor | None:
    """[D + 1], boundaries of the documents that context parallelism cuts separately; None: it cuts whole samples.

    A host's cp_partition_mode (Megatron's `dev` branch) has priority over `partition`.
    """
    mode = getattr(packed, "cp_partition_mode", None)
    if mode not in (None, "zigzag"):
        raise ValueError(f"--cp-partition-mode must be zigzag (two pieces of each document per rank); got {mode!r}")
    if mode is None and partition == "sample":
        return None
    padded = packed.cu_seqlens_q_padded
    return packed.cu_seqlens_q if padded is None else padded
