"""Load-balancing and z losses over given process groups: a rank's share of a loss that is defined globally.

The balance loss is E * sum_i f_i * P_i (Switch Transformer; arXiv 2605.06663 section 3 balances globally): f_i the
fraction of choices that went to expert i, a constant in the gradient, P_i the mean score of expert i. Both are taken
over every token of every rank, so each rank adds its own tokens' share and the shares of all ranks sum to the loss.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Choices and valid tokens of a population: a micro-batch, or several, over the ranks of a group."""

    tokens_per_expert_E: Tensor
    """[E] int64."""
    num_tokens: Tensor
    """[] int64, valid tokens: neither padding nor with logits that are not finite."""

    @classmethod
    def of(cls, counts_X: Tensor, *, num_experts: int) -> TokenCounts:
        """Views of [X] int64 counts that begin with the choices of every expert, then the valid tokens."""
        return cls(tokens_per_expert_E=counts_X[:num_experts], num_tokens=counts_X[num_experts])

    @functools.cached_property
    def divisor(self) -> Tensor:
        """[] int64, `num_tokens`, at least 1: both losses divide by it."""
        return self.num_tokens.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """What the losses of one layer in one micro-batch are made of; constant in the gradient."""

    fraction: TokenCounts
    """Where the fractions of the balance over all ranks come from: this micro-batch, or those of the step so far."""
    population: TokenCounts
    """This micro-batch over all ranks."""
    own: TokenCounts | None = None
    """This micro-batch over the ranks of one data-parallel rank; None: not asked for."""
    weights_DE: Tensor | None = None
    """`document_weights`, equal on the ranks that share a document; None: not asked for."""


def reduce_counts(counts_X: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a rank's counts over `group` with one collective (none when the group is one rank).

    Args:
        counts_X: [X] int64 of this rank, `ops.Routing.counts_X` or any other counts; left as it is.
        group: every rank that routes a part of the same population (tensor x data x context parallel).

    Returns:
        [X] int64, equal on every rank of the group.
    """
    if group is None or group.size() == 1:
        return counts_X
    summed_X = counts_X.clone()
    dist.all_reduce(summed_X, group=group)
    return summed_X


def load_balancing_loss(score_sums_E: Tensor, *, fraction: TokenCounts, population: TokenCounts, top_k: int) -> Tensor:
    """This rank's share of E * sum_i f_i * P_i.

    Args:
        score_sums_E: [E] float32, this rank's scores summed over its tokens; differentiable.
        fraction: where f_i = tokens_per_expert_i / (num_tokens * top_k) comes from; constant.
        population: the micro-batch over all ranks, whose num_tokens divides the score sums.
        top_k: choices a token.

    Returns:
        [] float32. The shares of all ranks sum to the loss, which is 1 for a perfectly balanced router.
    """
    # every constant in one vector, so that forward and backward are few operations
    scale = score_sums_E.shape[0] / top_k
    num_tokens = fraction.divisor * population.divisor
    return torch.dot(fraction.tokens_per_expert_E * scale / num_tokens, score_sums_E)


def document_weights(choices_DE: Tensor, *, pool_sizes_D: Tensor | None, population: TokenCounts) -> Tensor:
    """What the score of an expert weighs in the balance loss of a document, which is

        sum_d (T_d / T) * (|P_d| / (K * T_d)) * sum_i n_di * (1 / T_d) * sum_t s_ti

    over documents d of T_d valid tokens t with pool P_d, n_di of whose K * T_d choices went to expert i: the mean over
    all T tokens of each document's own balance loss inside its pool, 1 where it is perfectly balanced. Over full pools
    and documents of equal length this is Megatron's seq_aux_loss.

    Args:
        choices_DE: [D, E] int64, n_di over every rank that holds a piece of the document.
        pool_sizes_D: [D] int64, |P_d|; None: all experts.
        population: the micro-batch over all ranks, whose valid tokens are T.

    Returns:
        [D, E] float32; constant.
    """
    size = choices_DE.shape[1] if pool_sizes_D is None else pool_sizes_D
    num_choices_D = choices_DE.sum(dim=-1).clamp(min=1)
    return choices_DE * (size / (num_choices_D * population.divisor))[:, None]


def document_balance_loss(score_sums_DE: Tensor, *, weights_DE: Tensor) -> Tensor:
    """This rank's share of the balance loss of documents, each inside its pool (after DeepSeek's, arXiv 2412.19437).

    Args:
        score_sums_DE: [D, E] float32, this rank's scores summed over the tokens of each document; differentiable.
        weights_DE: `document_weights`.

    Returns:
        [] float32. The shares of all ranks sum to the loss.
    """
    return torch.dot(score_sums_DE.flatten(), weights_DE.flatten())


def z_loss(z_T: Tensor, *, population: TokenCounts) -> Tensor:
    """This rank's share of the mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906).

    Args:
        z_T: [T] float32, 0 for padding; differentiable.
        population: the micro-batch over all ranks.
    """
    return torch.dot(z_T, z_T) / population.divisor


def weighted_sum(losses: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Sum of loss times weight over one or more losses of shape []; one operation for every loss."""
    (loss, weight), *others = losses
    total = loss * weight
    for loss, weight in others:
        total = torch.add(total, loss, alpha=weight)
    return total
