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


def load_balancing_loss(
    score_sums_E: Tensor, *, fraction: TokenCounts, population: TokenCounts, top_k: int
) -> Tensor:
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
