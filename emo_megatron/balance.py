"""Load-balancing and z losses over given process groups: a rank's share of a loss that is defined globally.

The balance loss is E * sum_i f_i * P_i (Switch Transformer; arXiv 2605.06663 section 3 balances globally): f_i the
fraction of choices that went to expert i, a constant in the gradient, P_i the mean score of expert i. Both are taken
over every token of every rank, so each rank adds its own tokens' share and the shares of all ranks sum to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """Choices and valid tokens of one micro-batch, summed over the ranks of a group."""

    tokens_per_expert_E: Tensor
    """[E] int64."""
    num_tokens: Tensor
    """[] int64, tokens that are not padding."""

    def plus(self, other: TokenCounts) -> TokenCounts:
        """The counts of both populations together."""
        return TokenCounts(
            tokens_per_expert_E=self.tokens_per_expert_E + other.tokens_per_expert_E,
            num_tokens=self.num_tokens + other.num_tokens,
        )


def reduce_counts(
    tokens_per_expert_E: Tensor, *, num_tokens: Tensor, group: dist.ProcessGroup | None
) -> TokenCounts:
    """Sum a rank's counts over `group` with one collective (none when the group is one rank).

    Args:
        tokens_per_expert_E: [E] int64 of this rank.
        num_tokens: [] int64, this rank's tokens that are not padding.
        group: every rank that routes a part of the same population (tensor x data x context parallel).
    """
    if group is None or group.size() == 1:
        return TokenCounts(tokens_per_expert_E=tokens_per_expert_E, num_tokens=num_tokens)
    packed = torch.cat([tokens_per_expert_E, num_tokens.reshape(1)])
    dist.all_reduce(packed, group=group)
    return TokenCounts(tokens_per_expert_E=packed[:-1], num_tokens=packed[-1])


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
    num_experts = score_sums_E.shape[0]
    f_E = fraction.tokens_per_expert_E / (fraction.num_tokens * top_k).clamp(min=1)
    return num_experts * torch.dot(f_E, score_sums_E) / population.num_tokens.clamp(min=1)


def z_loss(z_T: Tensor, *, population: TokenCounts) -> Tensor:
    """This rank's share of the mean squared log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906).

    Args:
        z_T: [T] float32, 0 for padding; differentiable.
        population: the micro-batch over all ranks.
    """
    return z_T.square().sum() / population.num_tokens.clamp(min=1)


def load_imbalance(counts: TokenCounts) -> Tensor:
    """Largest load over mean load of the experts, [] float32; 1 is perfect balance."""
    load_E = counts.tokens_per_expert_E.float()
    return load_E.max() / load_E.mean().clamp(min=1e-9)
