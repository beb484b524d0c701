"""The routing ops in plain PyTorch: the definition every other backend is tested against.

Shapes: T tokens on this rank, E routed experts, K experts a token, D documents of the micro-batch.
Source: arXiv 2605.06663, section 3, and its authors' released router; the three steps are apart because an all-reduce
over the ranks that share a document stands between the first and the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SCORE_FRACTION_BITS = 27
"""Document scores are probabilities in fixed point with so many fractional bits: sums of 2**36 tokens fit in int64."""


NUM_TOTALS = 3
"""Entries of `Routing.counts_X` behind those of the experts."""
NUM_STATISTICS = 5
"""Entries of `document_statistics`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where every token goes, and what the losses and metrics need. Differentiable: probs, score_sums, z."""

    probs_TE: Tensor
    """[T, E] in the dtype of the logits: the weight of each chosen expert, 0 elsewhere and for padding."""
    routing_map_TE: Tensor
    """[T, E] bool: True where the expert is chosen, exactly K a token. Padding is sent to K experts like any token,
    with weight 0, because dispatchers count on K rows a token."""
    counts_X: Tensor
    """[E + 3] int64, sums over this rank's tokens, exact whatever their order: tokens per expert, then valid tokens,
    non-finite tokens and the entropy of the valid ones. The properties below name its parts."""
    score_sums_E: Tensor
    """[E] float32: scores (K-independent, summing to 1 a token) summed over tokens, for the balance loss."""
    z_T: Tensor
    """[T] float32: log-sum-exp of the logits that carry weight; 0 for padding and non-finite tokens."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """[E] int64: valid tokens that chose the expert."""
        return self.counts_X[:-NUM_TOTALS]

    @property
    def num_tokens(self) -> Tensor:
        """[] int64: valid tokens, those that are neither padding nor non-finite."""
        return self.counts_X[-3]

    @property
    def num_nonfinite(self) -> Tensor:
        """[] int64: tokens, padding left out, whose logits no weight can be made of; see `pool_topk`."""
        return self.counts_X[-2]

    @property
    def entropy_sum(self) -> Tensor:
        """[] int64: entropy of the scores, summed over the valid tokens, each rounded to units of 2**-27 nats."""
        return self.counts_X[-1]


def document_scores(logits_TE: Tensor, *, document_ids_T: Tensor, num_documents: int) -> Tensor:
    """Sum each document's router probabilities, exactly.

    Args:
        logits_TE: [T, E] router logits of any float dtype.
        document_ids_T: [T] int64 in [-1, num_documents); -1 is padding and counts nowhere.
        num_documents: D.

    Returns:
        [D, E] int64, the softmax over all E experts in units of 2**-27, summed over the document's tokens. Integer
        sums do not depend on the order of the tokens or on how ranks cut the document. A token with a logit that is
        NaN or +inf, or with no logit above -inf, adds nothing. Not differentiable.
    """
    with torch.no_grad():
        is_finite_T = logits_TE.float().amax(dim=-1).isfinite()
        probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
        fixed_TE = (probs_TE * 2.0**SCORE_FRACTION_BITS).round_().to(torch.int64)
        # what counts nowhere goes to a row of its own that is cut off again: no data-dependent shapes, no host sync
        row_T = torch.where((document_ids_T >= 0) & is_finite_T, document_ids_T, num_documents)
        sums = fixed_TE.new_zeros(num_documents + 1, fixed_TE.shape[1])
        return sums.index_add_(0, row_T, fixed_TE)[:num_documents]


def select_pool(scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0) -> Tensor:
    """Choose each document's pool: its best-scored experts.

    Args:
        scores_DE: [D, E] document scores, reduced over every rank that holds a piece of the document.
        pool_sizes_D: [D] int64, experts wanted; E and more means all.
        num_forced: the last so many experts are always in and count towards the size.

    Returns:
        [D, E] bool with max(pool_size, num_forced) True a row. Ties go to the lower index. Not differentiable.
    """
    num_free = scores_DE.shape[1] - num_forced
    order_DE = scores_DE[:, :num_free].sort(dim=-1, descending=True, stable=True).indices
    is_kept_DE = (
        torch.arange(num_free, device=scores_DE.device) < (pool_sizes_D - num_forced)[:, None]
    )
    pool_DE = torch.ones_like(scores_DE, dtype=torch.bool)
    pool_DE[:, :num_free] = torch.empty_like(is_kept_DE).scatter_(1, order_DE, is_kept_DE)
    return pool_DE


def pool_topk(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor | None = None,
    pool_DE: Tensor | None = None,
    top_k: int,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    pre_softmax: bool = True,
    expert_bias_E: Tensor | None = None,
    scaling_factor: float | None = None,
    mask: Literal["logits", "selection"] = "logits",
) -> Routing:
    """Route each token to the top-k experts of its document's pool.

    Args:
        logits_TE: [T, E] router logits, differentiable.
        document_ids_T: [T] int64, the row of pool_DE each token belongs to; -1 is padding, which has no weight and
            counts nowhere. None: no padding (then pool_DE must be None or have one row).
        pool_DE: [D, E] bool, True = in the pool, at least top_k True a row. None: all experts. One row serves every
            document.
        top_k: K, experts a token.
        score_function: softmax, or sigmoid normalised over the chosen experts.
        pre_softmax: weights are the softmax over the pool at the chosen experts (the paper); False: softmax over the
            chosen logits alone, Megatron's renormalised top-k. Ignored for sigmoid.
        expert_bias_E: [E] float32 added to sigmoid scores for the choice only.
        scaling_factor: multiplies the weights.
        mask: "logits": experts outside the pool carry no weight and no loss (the paper). "selection": the pool limits
            the choice only.

    Returns:
        Routing. Ties go to the lower expert index. No gradient flows through the choice.

        A token is non-finite if one of its E logits is NaN or +inf, or if none of those that carry weight is above
        -inf. It gets the K lowest-numbered experts of its pool, with weights that are NaN, so that the fault reaches
        the loss; z is 0, no sum holds it, and no gradient comes from it. Padding stays padding whatever its logits.
    """
    is_allowed_TE, is_padding_T = _allowed(logits_TE, document_ids_T, pool_DE)
    logits_f_TE = logits_TE.float()
    is_masked_TE = None if is_allowed_TE is None or mask != "logits" else ~is_allowed_TE
    is_nonfinite_T = _nonfinite(logits_f_TE.detach(), is_masked_TE)
    # zeros in place of these rows: neither values nor gradients of theirs are NaN, and all their experts tie
    logits_f_TE = logits_f_TE.masked_fill(is_nonfinite_T[:, None], 0.0)
    # a tensor of its own, so that without a mask gradients add up in the order of a pool of all experts
    carrying_TE = logits_f_TE.view_as(logits_f_TE)
    if is_masked_TE is not None:
        carrying_TE = logits_f_TE.masked_fill(
            is_masked_TE & ~is_nonfinite_T[:, None], float("-inf")
        )

    if score_function == "softmax":
        scores_TE = torch.softmax(carrying_TE, dim=-1)
        keys_TE = scores_TE if pre_softmax else carrying_TE
    else:
        gates_TE = torch.sigmoid(logits_f_TE)
        keys_TE = gates_TE if expert_bias_E is None else gates_TE + expert_bias_E.float()
        counted_TE = gates_TE if is_masked_TE is None else gates_TE * ~is_masked_TE
        scores_TE = counted_TE / (counted_TE.sum(dim=-1, keepdim=True) + 1e-20)
    expert_ids_TK = _best(keys_TE.detach(), is_allowed_TE, is_nonfinite_T, top_k)
    if score_function == "softmax":
        weights_TK = (scores_TE if pre_softmax else logits_f_TE).gather(1, expert_ids_TK)
        if not pre_softmax:
            weights_TK = torch.softmax(weights_TK, dim=-1)
    else:
        weights_TK = gates_TE.gather(1, expert_ids_TK)
        if top_k > 1:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if scaling_factor:
        weights_TK = weights_TK * scaling_factor
    weights_TK = weights_TK.masked_fill(is_nonfinite_T[:, None], float("nan"))

    z_T = torch.logsumexp(carrying_TE, dim=-1)
    return _assemble(
        logits_TE, expert_ids_TK, weights_TK, scores_TE, z_T, is_padding_T, is_nonfinite_T
    )


def _best(
    keys_TE: Tensor, is_allowed_TE: Tensor | None, is_nonfinite_T: Tensor, top_k: int
) -> Tensor:
    """[T, K] int64, the experts with the largest keys; of a non-finite token the first ones of its pool."""
    # the mask goes onto the keys last: a bias, or an underflowed probability, must not let an excluded expert win,
    # and a logit of -inf not let it tie
    keys_TE = keys_TE.clamp(min=torch.finfo(torch.float32).min)
    keys_TE = keys_TE.masked_fill(is_nonfinite_T[:, None], 0.0)
    if is_allowed_TE is not None:
        keys_TE = keys_TE.masked_fill(~is_allowed_TE, float("-inf"))
    return keys_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _allowed(
    logits_TE: Tensor, document_ids_T: Tensor | None, pool_DE: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which experts each token may use (None: all), and which tokens are padding (None: none)."""
    is_padding_T = None if document_ids_T is None else document_ids_T < 0
    if pool_DE is None:
        return None, is_padding_T
    if pool_DE.shape[0] == 1:
        return pool_DE.expand_as(logits_TE), is_padding_T
    if document_ids_T is None or is_padding_T is None:
        raise ValueError(
            f"pool_DE must have one row when document_ids_T is None; got {pool_DE.shape[0]} rows. "
            "Pass document_ids_T."
        )
    if pool_DE.shape[0] == 0:
        return None, is_padding_T
    # padding is let into every expert here, so that no row is all -inf, and taken out of every result later
    return pool_DE[document_ids_T.clamp(min=0)] | is_padding_T[:, None], is_padding_T


def _nonfinite(logits_f_TE: Tensor, is_masked_TE: Tensor | None) -> Tensor:
    """[T] bool: tokens with a logit that is NaN or +inf, or without one above -inf that carries weight."""
    # a maximum over what holds NaN is NaN
    is_nonfinite_T = ~logits_f_TE.amax(dim=-1).isfinite()
    if is_masked_TE is None:
        return is_nonfinite_T
    lowest = float("-inf")
    return is_nonfinite_T | (logits_f_TE.masked_fill(is_masked_TE, lowest).amax(dim=-1) == lowest)


def _assemble(
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    z_T: Tensor,
    is_padding_T: Tensor | None,
    is_nonfinite_T: Tensor,
) -> Routing:
    """Scatter the choice into Megatron's [T, E] form and take tokens that do not count out of all that is summed."""
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_ids_TK, True)
    probs_TE = torch.zeros_like(logits_TE).scatter(1, expert_ids_TK, weights_TK.to(logits_TE.dtype))
    is_left_out_T = is_nonfinite_T
    if is_padding_T is not None:
        probs_TE = probs_TE.masked_fill(is_padding_T[:, None], 0.0)
        is_left_out_T = is_nonfinite_T | is_padding_T
        is_nonfinite_T = is_nonfinite_T & ~is_padding_T
    scores_TE = scores_TE.masked_fill(is_left_out_T[:, None], 0.0)
    entropy_T = -torch.xlogy(scores_TE.detach(), scores_TE.detach()).sum(dim=-1)
    facts_X = [(~is_left_out_T).sum(), is_nonfinite_T.sum(), _to_units(entropy_T).sum()]
    return Routing(
        probs_TE=probs_TE,
        routing_map_TE=map_TE,
        counts_X=torch.cat([(map_TE & ~is_left_out_T[:, None]).sum(dim=0), torch.stack(facts_X)]),
        score_sums_E=scores_TE.sum(dim=0),
        z_T=z_T.masked_fill(is_left_out_T, 0.0),
    )


def _to_units(nats_X: Tensor) -> Tensor:
    """Entropies in units of 2**-27 nats, int64; of one expert that has everything, rounding may give less than none."""
    return (nats_X.clamp(min=0.0) * 2.0**SCORE_FRACTION_BITS).round().to(torch.int64)


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


def given_statistics(
    scores_DE: Tensor | None, pool_DE: Tensor | None, used_DW: Tensor | None
) -> Tensor:
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
        entropies = _to_units(-torch.xlogy(shares_DE, shares_DE).sum(dim=-1)).sum()
    if used_DW is not None:
        bits_B = torch.arange(32, device=used_DW.device)
        used_D = ((used_DW[:, :, None] >> bits_B) & 1).sum(dim=(1, 2))
        num_users, num_used = (used_D > 0).sum(), used_D.sum()
    return torch.stack([num_scored, pool_sizes, entropies, num_users, num_used])
