"""The routing ops in plain PyTorch: the reference implementation, against which other backends are tested.

Shapes: T tokens on this rank, E routed experts, K experts per token, D documents of the micro-batch.
Source: arXiv 2605.06663, section 3, and the authors' released router. Routing is three separate ops, because document
scores are summed over the ranks that share a document (an all-reduce) before pools are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emo_megatron.ops.groups import groups_used, open_experts
from emo_megatron.ops.reference_documents import (
    SCORE_FRACTION_BITS,
    ScoreFunction,
    document_scores,
    document_statistics,
    experts_used,
    gates,
    select_pool,
    to_units,
)
from emo_megatron.ops.sizes import draw_bits

__all__ = [
    "NUM_TOTALS",
    "SCORE_FRACTION_BITS",
    "Routing",
    "document_scores",
    "document_statistics",
    "draw_bits",
    "experts_used",
    "pool_topk",
    "select_pool",
]

NUM_TOTALS = 4
"""Number of entries of `Routing.counts_X` after those of the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The experts of every token, and the inputs of losses and metrics. Differentiable: probs, score_sums, z."""

    probs_TE: Tensor
    """[T, E] in the dtype of the logits: the weight of each chosen expert, 0 elsewhere and for padding."""
    routing_map_TE: Tensor
    """[T, E] bool: True for chosen experts, exactly K per token. Padding also has K experts, with weight 0, because
    dispatchers rely on K rows per token."""
    counts_X: Tensor
    """[E + 4] int64, exact sums over this rank's tokens, independent of their order: tokens per expert, then valid
    tokens, non-finite tokens, valid tokens in more than group_topk groups, and the entropy of the valid tokens. The
    properties below return these parts."""
    score_sums_RE: Tensor
    """[R, E] float32: scores (independent of K, with sum 1 per token) summed over tokens, for load-balancing losses.
    One row for all tokens, or one row per document if `pool_topk` got num_documents."""
    z_T: Tensor
    """[T] float32: log-sum-exp of the logits that carry weight; 0 for padding and non-finite tokens."""
    document_choices_DE: Tensor
    """[D, E] int64: valid tokens of each document that chose the expert; [0, E] without num_documents."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """[E] int64: valid tokens that chose the expert."""
        return self.counts_X[:-NUM_TOTALS]

    @property
    def num_tokens(self) -> Tensor:
        """[] int64: valid tokens: not padding, and finite."""
        return self.counts_X[-4]

    @property
    def num_nonfinite(self) -> Tensor:
        """[] int64: non-finite tokens, without padding; `pool_topk` defines them."""
        return self.counts_X[-3]

    @property
    def entropy_sum(self) -> Tensor:
        """[] int64: entropy of the scores, rounded per token to units of `2**-27` nats, summed over valid tokens."""
        return self.counts_X[-1]

    @property
    def num_over_groups(self) -> Tensor:
        """[] int64: valid tokens with experts in more than group_topk groups."""
        return self.counts_X[-2]

    @property
    def score_sums_E(self) -> Tensor:
        """[E] float32: scores summed over all tokens."""
        sums_RE = self.score_sums_RE
        return sums_RE.squeeze(0) if sums_RE.shape[0] == 1 else sums_RE.sum(dim=0)


def pool_topk(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor | None = None,
    pool_DE: Tensor | None = None,
    top_k: int,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = True,
    expert_bias_E: Tensor | None = None,
    scaling_factor: float | None = None,
    mask: Literal["logits", "selection"] = "logits",
    num_groups: int | None = None,
    group_topk: int | None = None,
    num_documents: int | None = None,
) -> Routing:
    """Route each token to the top-k experts of its document's pool.

    Args:
        logits_TE: [T, E] router logits, differentiable.
        document_ids_T: [T] int64, each token's row of pool_DE; -1 is padding, which has no weight and is in no sum.
            None: no padding (then pool_DE must be None or have one row).
        pool_DE: [D, E] bool, True = in the pool, at least top_k True per row. None: all experts. A single row is the
            pool of all documents.
        top_k: K, experts per token.
        score_function: softmax; or the gates of sigmoid or sqrtsoftplus (the square root of softplus), normalised over
            the chosen experts.
        pre_softmax: True (the paper): weights are the chosen experts' values of the softmax over the pool. False:
            softmax over the chosen logits only, Megatron's renormalised top-k. Ignored for gates.
        expert_bias_E: [E] float32, added to gates for the choice only.
        scaling_factor: factor of the weights.
        mask: "logits" (the paper): experts outside the pool have no weight and no loss. "selection": the pool limits
            only the choice.
        num_groups: number of groups of E / num_groups adjacent experts. A token uses group_topk groups, or more if its
            pool holds too few experts in them; see groups.open_experts. None: no limit.
        group_topk: required with num_groups; group_topk groups must hold at least K experts.
        num_documents: D; sum scores and choices per document; requires document_ids_T. None: sum over all tokens.

    Returns:
        Routing. Ties go to the lower expert index. No gradient flows through the choice.

        A token is non-finite if one of its E logits is NaN or +inf, or if no logit that carries weight is above -inf.
        Its experts are the K of its pool with the lowest indices, in any groups. Its weights are NaN, so that the loss
        becomes NaN. Its z is 0; the token is in no sum and gives no gradient. Padding stays padding for any logits.
    """
    is_allowed_TE, is_padding_T = _allowed(logits_TE, document_ids_T, pool_DE)
    logits_f_TE = logits_TE.float()
    is_masked_TE = None if is_allowed_TE is None or mask != "logits" else ~is_allowed_TE
    is_nonfinite_T = _nonfinite(logits_f_TE.detach(), is_masked_TE)
    # non-finite rows become zeros: their values and gradients are not NaN, and all their experts tie
    logits_f_TE = logits_f_TE.masked_fill(is_nonfinite_T[:, None], 0.0)
    # a separate tensor, so that gradients without a mask add up in the same order as with a pool of all experts
    carrying_TE = logits_f_TE.view_as(logits_f_TE)
    if is_masked_TE is not None:
        carrying_TE = logits_f_TE.masked_fill(is_masked_TE & ~is_nonfinite_T[:, None], float("-inf"))

    scores_TE, keys_TE, weighing_TE = _scores(
        logits_f_TE,
        carrying_TE,
        is_masked_TE,
        score_function=score_function,
        pre_softmax=pre_softmax,
        expert_bias_E=expert_bias_E,
    )
    is_open_TE = is_allowed_TE
    if num_groups is not None and group_topk is not None:
        is_open_TE = open_experts(keys_TE, is_allowed_TE, num_groups=num_groups, group_topk=group_topk, top_k=top_k)
        is_any_TE = is_nonfinite_T[:, None].expand_as(is_open_TE)
        is_open_TE |= is_any_TE if is_allowed_TE is None else is_any_TE & is_allowed_TE
    expert_ids_TK = _best(keys_TE, is_open_TE, is_nonfinite_T, top_k)
    weights_TK = weighing_TE.gather(1, expert_ids_TK)
    if score_function == "softmax" and not pre_softmax:
        weights_TK = torch.softmax(weights_TK, dim=-1)
    elif score_function != "softmax" and top_k > 1:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    if scaling_factor:
        weights_TK = weights_TK * scaling_factor
    weights_TK = weights_TK.masked_fill(is_nonfinite_T[:, None], float("nan"))

    z_T = torch.logsumexp(carrying_TE, dim=-1)
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_ids_TK, True)
    probs_TE = torch.zeros_like(logits_TE).scatter(1, expert_ids_TK, weights_TK.to(logits_TE.dtype))
    is_over_T = torch.zeros_like(is_nonfinite_T)
    if num_groups is not None and group_topk is not None:
        is_over_T = groups_used(map_TE, num_groups) > group_topk
    return _assemble(
        probs_TE,
        map_TE,
        scores_TE,
        z_T,
        is_padding_T,
        is_nonfinite_T,
        is_over_T=is_over_T,
        document_ids_T=document_ids_T,
        num_documents=num_documents,
    )


def _scores(
    logits_TE: Tensor,
    carrying_TE: Tensor,
    is_masked_TE: Tensor | None,
    *,
    score_function: ScoreFunction,
    pre_softmax: bool,
    expert_bias_E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three [T, E]: scores for the losses, keys that rank experts (constant), and values from which weights are made.

    `carrying_TE` are the logits that carry weight: -inf where `is_masked_TE` is True.
    """
    if score_function == "softmax":
        scores_TE = torch.softmax(carrying_TE, dim=-1)
        if pre_softmax:
            return scores_TE, scores_TE.detach(), scores_TE
        return scores_TE, carrying_TE.detach(), logits_TE
    gates_TE = gates(logits_TE, score_function)
    keys_TE = gates_TE.detach()
    if expert_bias_E is not None:
        keys_TE = keys_TE + expert_bias_E.float()
    counted_TE = gates_TE if is_masked_TE is None else gates_TE * ~is_masked_TE
    return counted_TE / (counted_TE.sum(dim=-1, keepdim=True) + 1e-20), keys_TE, gates_TE


def _best(keys_TE: Tensor, is_allowed_TE: Tensor | None, is_nonfinite_T: Tensor, top_k: int) -> Tensor:
    """[T, K] int64, the experts with the largest keys; for a non-finite token, the first experts of its pool."""
    # keys are masked last: otherwise an excluded expert could win by a bias or an underflowed probability, or tie by
    # a logit of -inf
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
            f"pool_DE must have one row when document_ids_T is None; got {pool_DE.shape[0]} rows. Pass document_ids_T."
        )
    if pool_DE.shape[0] == 0:
        return None, is_padding_T
    # padding may use every expert here, so that no row is all -inf; every result is masked for padding later
    return pool_DE[document_ids_T.clamp(min=0)] | is_padding_T[:, None], is_padding_T


def _nonfinite(logits_f_TE: Tensor, is_masked_TE: Tensor | None) -> Tensor:
    """[T] bool: tokens with a logit that is NaN or +inf, or with no logit above -inf that carries weight."""
    # a maximum over values with NaN is NaN
    is_nonfinite_T = ~logits_f_TE.amax(dim=-1).isfinite()
    if is_masked_TE is None:
        return is_nonfinite_T
    lowest = float("-inf")
    return is_nonfinite_T | (logits_f_TE.masked_fill(is_masked_TE, lowest).amax(dim=-1) == lowest)


def _assemble(
    probs_TE: Tensor,
    map_TE: Tensor,
    scores_TE: Tensor,
    z_T: Tensor,
    is_padding_T: Tensor | None,
    is_nonfinite_T: Tensor,
    *,
    is_over_T: Tensor,
    document_ids_T: Tensor | None,
    num_documents: int | None,
) -> Routing:
    """Mask padding and non-finite tokens, and compute the sums of `Routing`."""
    is_left_out_T = is_nonfinite_T
    if is_padding_T is not None:
        probs_TE = probs_TE.masked_fill(is_padding_T[:, None], 0.0)
        is_left_out_T = is_nonfinite_T | is_padding_T
        is_nonfinite_T = is_nonfinite_T & ~is_padding_T
    scores_TE = scores_TE.masked_fill(is_left_out_T[:, None], 0.0)
    counted_TE = map_TE & ~is_left_out_T[:, None]
    entropy_T = -torch.xlogy(scores_TE.detach(), scores_TE.detach()).sum(dim=-1)
    num_over = (is_over_T & ~is_left_out_T).sum()
    totals = [(~is_left_out_T).sum(), is_nonfinite_T.sum(), num_over, to_units(entropy_T).sum()]
    sums_RE = scores_TE.sum(dim=0, keepdim=True)
    choices_DE = torch.zeros_like(counted_TE[:0], dtype=torch.int64)
    if num_documents is not None:
        assert document_ids_T is not None, "num_documents needs document_ids_T"
        # tokens that are left out have values of 0, so their row does not matter
        row_T = document_ids_T.clamp(min=0)
        shape = (max(num_documents, 1), map_TE.shape[1])
        sums_RE = scores_TE.new_zeros(shape).index_add(0, row_T, scores_TE)[:num_documents]
        choices_DE = row_T.new_zeros(shape).index_add_(0, row_T, counted_TE.long())[:num_documents]
    return Routing(
        probs_TE=probs_TE,
        routing_map_TE=map_TE,
        counts_X=torch.cat([counted_TE.sum(dim=0), torch.stack(totals)]),
        score_sums_RE=sums_RE,
        z_T=z_T.masked_fill(is_left_out_T, 0.0),
        document_choices_DE=choices_DE,
    )
