"""Load-balancing loss and z-loss over given process groups: each rank's share of a loss that is defined globally.

The load-balancing loss is E * sum_i f_i * P_i (Switch Transformer; arXiv 2605.06663 section 3 balances globally). f_i
is the fraction of choices of expert i, a constant in the gradient. P_i is the mean score of expert i. Both f_i and P_i
are computed over all tokens of all ranks. Each rank returns the share of its own tokens; the shares sum to the loss.
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
    """Choices and valid tokens of a population: one or several micro-batches over the ranks of a group."""

    tokens_per_expert_E: Tensor
    """[E] int64."""
    num_tokens: Tensor
    """[] int64, valid tokens: not padding, and with finite logits."""

    @classmethod
    def of(cls, counts_X: Tensor, *, num_experts: int) -> TokenCounts:
        """Views of [X] int64 counts: first the choices of every expert, then the number of valid tokens."""
        return cls(tokens_per_expert_E=counts_X[:num_experts], num_tokens=counts_X[num_experts])

    @functools.cached_property
    def divisor(self) -> Tensor:
        """[] int64, `num_tokens` but at least 1: the divisor of both losses."""
        return self.num_tokens.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Counts from which the losses of one layer in one micro-batch are computed; constant in the gradient."""

    fraction: TokenCounts
    """Source of the fractions f_i over all ranks: this micro-batch, or the micro-batches of the step so far."""
    population: TokenCounts
    """This micro-batch over all ranks."""
    own: TokenCounts | None = None
    """This micro-batch over the ranks of one data-parallel rank; None: not requested."""
    weights_DE: Tensor | None = None
    """`document_weights`, equal on the ranks that share a document; None: not requested."""


def reduce_counts(counts_X: Tensor, *, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a rank's counts over `group` with one collective (none when the group is one rank).

    Args:
        counts_X: [X] int64 of this rank, `ops.Routing.counts_X` or any other counts; not modified.
        group: all ranks that route a part of the same population (tensor x data x context parallel).

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
        fraction: counts of f_i = tokens_per_expert_i / (num_tokens * top_k); constant.
        population: the micro-batch over all ranks; its num_tokens divides the score sums.
        top_k: choices per token.

    Returns:
        [] float32. The shares of all ranks sum to the loss. The loss is 1 for a perfectly balanced router.
    """
    # all constants in one vector, so that forward and backward need few operations
    scale = score_sums_E.shape[0] / top_k
    num_tokens = fraction.divisor * population.divisor
    return torch.dot(fraction.tokens_per_expert_E * scale / num_tokens, score_sums_E)


def document_weights(choices_DE: Tensor, *, pool_sizes_D: Tensor | None, population: TokenCounts) -> Tensor:
    """Weight of each expert's score in the load-balancing loss of documents, which is

        sum_d (T_d / T) * (|P_d| / (K * T_d)) * sum_i n_di * (1 / T_d) * sum_t s_ti

    Document d has T_d valid tokens t and the pool P_d; n_di of its K * T_d choices are expert i. Each document has a
    load-balancing loss inside its own pool, which is 1 for perfect balance. The sum is the mean of these losses over
    all T tokens. With pools of all experts and documents of equal length, the sum is Megatron's seq_aux_loss.

    Args:
        choices_DE: [D, E] int64, n_di over every rank that holds a piece of the document.
        pool_sizes_D: [D] int64, |P_d|; None: all experts.
        population: the micro-batch over all ranks; T is its number of valid tokens.

    Returns:
        [D, E] float32; constant.
    """
    size = choices_DE.shape[1] if pool_sizes_D is None else pool_sizes_D
    num_choices_D = choices_DE.sum(dim=-1).clamp(min=1)
    return choices_DE * (size / (num_choices_D * population.divisor))[:, None]


def document_balance_loss(score_sums_DE: Tensor, *, weights_DE: Tensor) -> Tensor:
    """This rank's share of the load-balancing loss of documents, each inside its pool (DeepSeek, arXiv 2412.19437).

    Args:
        score_sums_DE: [D, E] float32, this rank's scores summed over the tokens of each document; differentiable.
        weights_DE: result of `document_weights`.

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
    """Sum of loss times weight over one or more losses of shape []; one operation per loss."""
    (loss, weight), *others = losses
    total = loss * weight
    for loss, weight in others:
        total = torch.add(total, loss, alpha=weight)
    return total
