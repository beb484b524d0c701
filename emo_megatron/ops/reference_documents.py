"""Scores, pools and statistics of documents in plain PyTorch: the reference implementation for tests of other backends.

Shapes: T tokens on this rank, E routed experts, D documents of the micro-batch, W words of 32 bits for E bits. Document
scores are summed over the ranks that share a document (all-reduce) before pools are chosen. Source: arXiv 2605.06663.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

SCORE_FRACTION_BITS = 27
"""Number of fractional bits of document scores, which are in fixed point. Sums over `2**36` tokens fit in int64."""
MAX_GATE_UNITS = 2**30 - 1
"""Largest gate in document scores, just below 8. Only the square root of softplus exceeds it, for logits above 64."""
NUM_STATISTICS = 5
"""Number of entries of `document_statistics`."""

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus"]


def document_scores(
    logits_TE: Tensor, *, document_ids_T: Tensor, num_documents: int, score_function: ScoreFunction = "softmax"
) -> Tensor:
    """Sum each document's router probabilities, or its gates, exactly.

    Args:
        logits_TE: [T, E] router logits of any float dtype.
        document_ids_T: [T] int64 in [-1, num_documents); -1 is padding, which is in no sum.
        num_documents: D.
        score_function: softmax over all E experts; or the gates of sigmoid or sqrtsoftplus.

    Returns:
        [D, E] int64: scores in units of `2**-27`, summed over the document's tokens. A gate is at most MAX_GATE_UNITS.
        Integer sums do not depend on the order of the tokens or on the split of the document over ranks. A token with a
        logit that is NaN or +inf, or with no logit above -inf, adds nothing. Not differentiable.
    """
    with torch.no_grad():
        if score_function == "softmax":
            scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        else:
            # float64, because torch's float32 functions round differently at a tensor's end, outside whole vectors
            scores_TE = gates(logits_TE.double(), score_function).clamp_(max=8.0)
        units_TE = (scores_TE * 2.0**SCORE_FRACTION_BITS).round_().to(torch.int64)
        row_T = _rows(logits_TE, document_ids_T, num_documents)
        sums = units_TE.new_zeros(num_documents + 1, units_TE.shape[1])
        return sums.index_add_(0, row_T, units_TE.clamp_(max=MAX_GATE_UNITS))[:num_documents]


def document_tokens(logits_TE: Tensor, *, document_ids_T: Tensor, num_documents: int) -> Tensor:
    """[D] int64, number of tokens of each document that `document_scores` sums; arguments: see `document_scores`."""
    row_T = _rows(logits_TE.detach(), document_ids_T, num_documents)
    counts = row_T.new_zeros(num_documents + 1)
    return counts.index_add_(0, row_T, torch.ones_like(row_T))[:num_documents]


def biased_scores(scores_DE: Tensor, tokens_D: Tensor, expert_bias_E: Tensor) -> Tensor:
    """Each document's sums of gates plus bias: the scores that choose pools if the bias takes part in the choice.

    Exact if |bias| is below `2**9` and a document has fewer than `2**26` tokens: the sums then fit in int64. Pools
    inside groups are chosen by sums of K // group_topk scores, so the limit on tokens is lower by that factor.

    Args:
        scores_DE: [D, E] int64, `document_scores` of gates.
        tokens_D: [D] int64, `document_tokens`. Both are summed over all ranks that hold a piece of the document.
        expert_bias_E: [E] float32, equal on all ranks.

    Returns:
        [D, E] int64, in units of `2**-27`.
    """
    units_E = (expert_bias_E.float() * 2.0**SCORE_FRACTION_BITS).round().to(torch.int64)
    return scores_DE + tokens_D[:, None] * units_E


def _rows(logits_TE: Tensor, document_ids_T: Tensor, num_documents: int) -> Tensor:
    """[T] int64, the document of each token; D, an extra row that is dropped, for padding and non-finite tokens."""
    # no data-dependent shapes, no host sync
    is_finite_T = logits_TE.float().amax(dim=-1).isfinite()
    return torch.where((document_ids_T >= 0) & is_finite_T, document_ids_T, num_documents)


def gates(logits_TE: Tensor, score_function: ScoreFunction) -> Tensor:
    """[T, E] sigmoid or square root of softplus, in the float dtype of the logits; differentiable, 0 at -inf."""
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE)
    # far below zero, softplus is e^x, and the derivative of the root would be 0 times infinity; this form avoids it,
    # but its last bits differ from Megatron's
    is_low_TE = logits_TE < -20.0
    low_TE = torch.exp(0.5 * logits_TE.masked_fill(~is_low_TE, float("-inf")))
    high_TE = torch.nn.functional.softplus(logits_TE.masked_fill(is_low_TE, 0.0)).sqrt()
    return torch.where(is_low_TE, low_TE, high_TE)


def select_pool(scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0) -> Tensor:
    """Choose each document's pool: its best-scored experts.

    Args:
        scores_DE: [D, E] document scores, reduced over all ranks that hold a piece of the document.
        pool_sizes_D: [D] int64, pool sizes in experts; E or more means all experts.
        num_forced: number of experts that are in every pool and count towards its size; the highest indices.

    Returns:
        [D, E] bool with max(pool_size, num_forced) True per row. Ties go to the lower index. Not differentiable.
    """
    num_free = scores_DE.shape[1] - num_forced
    order_DE = scores_DE[:, :num_free].sort(dim=-1, descending=True, stable=True).indices
    is_kept_DE = torch.arange(num_free, device=scores_DE.device) < (pool_sizes_D - num_forced)[:, None]
    pool_DE = torch.ones_like(scores_DE, dtype=torch.bool)
    pool_DE[:, :num_free] = torch.empty_like(is_kept_DE).scatter_(1, order_DE, is_kept_DE)
    return pool_DE


def experts_used(routing_map_TE: Tensor, *, document_ids_T: Tensor, num_documents: int) -> Tensor:
    """The experts that each document's tokens chose.

    Args:
        routing_map_TE: [T, E] bool.
        document_ids_T: [T] int64 in [-1, num_documents); -1 is padding, which is ignored.
        num_documents: D.

    Returns:
        [D, W] int32, W = ceil(E / 32): bit b of word w is set if a token chose expert 32 w + b. Ranks that share a
        document combine their words by bitwise or.
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
    """One of the tensors given to `document_statistics`, all on one device; raises if an argument is missing."""
    given_DX = used_DW if scores_DE is None else scores_DE
    if given_DX is None:
        raise ValueError("document_statistics requires scores_DE or used_DW; both are None")
    if pool_DE is not None and scores_DE is None:
        raise ValueError("document_statistics requires scores_DE with pool_DE; scores_DE is None")
    return given_DX


def document_statistics(
    scores_DE: Tensor | None = None, pool_DE: Tensor | None = None, used_DW: Tensor | None = None
) -> Tensor:
    """Sums over documents for metrics, exact in any order of the documents.

    Args:
        scores_DE: [D, E] int64, not negative: `document_scores`, summed over all ranks with a piece of the document.
        pool_DE: [D, E] bool, pools of the documents; requires scores_DE.
        used_DW: [D, W] int32, `experts_used`.

    Returns:
        [5] int64, with 0 for tensors that are not given: number of scored documents (sum of scores above 0); sum of
        their pool sizes; sum of the entropies of their score shares, each rounded to units of `2**-27` nats; number of
        documents that used an expert; sum of the numbers of experts that documents used.
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


def to_units(nats_X: Tensor) -> Tensor:
    """Entropies in units of `2**-27` nats, int64. Negative values, a rounding error if one expert has all, become 0."""
    return (nats_X.clamp(min=0.0) * 2.0**SCORE_FRACTION_BITS).round().to(torch.int64)
