"""Metrics of documents in plain PyTorch: the definition every other backend is tested against.

Shapes: T tokens on this rank, E routed experts, D documents of the micro-batch, W words of 32 bits that hold E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emo_megatron.ops.reference import to_units

NUM_STATISTICS = 5
"""Entries of `document_statistics`."""


def experts_used(routing_map_TE: Tensor, *, document_ids_T: Tensor, num_documents: int) -> Tensor:
    """Which experts each document's tokens chose.

    Args:
        routing_map_TE: [T, E] bool.
        document_ids_T: [T] int64 in [-1, num_documents); -1 is padding and counts nowhere.
        num_documents: D.

    Returns:
        [D, W] int32, W = ceil(E / 32): bit b of word w is set where a token chose expert 32 w + b. Ranks that share a
        document join their words with a bitwise or.
    """
    num_experts = routing_map_TE.shape[1]
    num_words = -(-num_experts // 32)
    row_T = torch.where(document_ids_T < 0, num_documents, document_ids_T)
    times_DE = routing_map_TE.new_zeros(num_documents + 1, 32 * num_words, dtype=torch.int32)
    times_DE[:, :num_experts].index_add_(0, row_T, routing_map_TE.int())
    is_used_DWB = (times_DE[:num_documents] > 0).view(num_documents, num_words, 32)
    bits_B = 1 << torch.arange(32, device=times_DE.device)
    return (is_used_DWB * bits_B).sum(dim=-1).to(torch.int32)


def given_statistics(scores_DE: Tensor | None, pool_DE: Tensor | None, used_DW: Tensor | None) -> Tensor:
    """One of what is given to `document_statistics`; the others must lie beside it."""
    given_DX = used_DW if scores_DE is None else scores_DE
    if given_DX is None:
        raise ValueError("document_statistics needs scores_DE or used_DW; both are None")
    if pool_DE is not None and scores_DE is None:
        raise ValueError("document_statistics needs scores_DE where pool_DE is given")
    return given_DX


def document_statistics(
    scores_DE: Tensor | None = None, pool_DE: Tensor | None = None, used_DW: Tensor | None = None
) -> Tensor:
    """Sums over documents for metrics, exact whatever the order of the documents.

    Args:
        scores_DE: [D, E] int64, `document_scores`, none negative, over every rank that holds a piece of the document.
        pool_DE: [D, E] bool, their pools; needs scores_DE.
        used_DW: [D, W] int32, `experts_used`.

    Returns:
        [5] int64, 0 where the tensor is not given: documents with a positive sum of scores; the sizes of their pools;
        the entropies of their shares of the score, each rounded to units of 2**-27 nats; documents that used an
        expert; experts they used.

    Raises:
        ValueError: there is neither scores_DE nor used_DW, or pool_DE without scores_DE.
    """
    given_DX = given_statistics(scores_DE, pool_DE, used_DW)
    nothing = given_DX.new_zeros((), dtype=torch.int64)
    num_scored, pool_sizes, entropies, num_users, num_used = [nothing] * NUM_STATISTICS
    if scores_DE is not None:
        totals_D = scores_DE.sum(dim=-1)
        num_scored = (totals_D > 0).sum()
        if pool_DE is not None:
            pool_sizes = (pool_DE.sum(dim=-1) * (totals_D > 0)).sum()
        shares_DE = scores_DE.double() / totals_D.clamp(min=1)[:, None]
        entropies = to_units(-torch.xlogy(shares_DE, shares_DE).sum(dim=-1)).sum()
    if used_DW is not None:
        bits_B = torch.arange(32, device=used_DW.device)
        used_D = ((used_DW[:, :, None] >> bits_B) & 1).sum(dim=(1, 2))
        num_users, num_used = (used_D > 0).sum(), used_D.sum()
    return torch.stack([num_scored, pool_sizes, entropies, num_users, num_used])
