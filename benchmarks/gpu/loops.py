"""The routing ops as a loop over documents in float64 on the CPU, for comparison in smoke.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from inputs import Inputs
from torch import Tensor

CLOSE = 1e-6
"""Of two keys as float32 has them: the choice between them may go either way."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a routing should be; rows of padding are zero."""

    probs_TE: Tensor
    routing_map_TE: Tensor
    tokens_per_expert_E: Tensor
    score_sums_E: Tensor
    z_T: Tensor
    is_clear_T: Tensor
    """[T] bool: no near tie decides the choice, and the token is no padding."""


def scores_by_loop(inputs: Inputs) -> Tensor:
    """[D, E] float64: sums of softmax."""
    probs_TE = inputs.logits_TE.double().softmax(-1)
    sums = [probs_TE[inputs.document_ids_T == document].sum(0) for document in range(inputs.num_documents)]
    return torch.stack(sums)


def pools_by_loop(scores_DE: Tensor, sizes_D: Tensor) -> Tensor:
    """[D, E] bool: the best of every row, the lower index among equals."""
    pool_DE = torch.zeros_like(scores_DE, dtype=torch.bool)
    for pool_E, scores_E, size in zip(pool_DE, scores_DE.tolist(), sizes_D.tolist(), strict=True):
        order = sorted(range(len(scores_E)), key=lambda e, scores_E=scores_E: (-scores_E[e], e))
        pool_E[order[:size]] = True
    return pool_DE


def route_by_loop(inputs: Inputs, pool_DE: Tensor, scoring: str) -> Expected:
    """Differentiable in the logits: one document after the other."""
    logits_TE = inputs.logits_TE.double()
    probs_TE, scores_TE = torch.zeros_like(logits_TE), torch.zeros_like(logits_TE)
    map_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    z_T, is_clear_T = torch.zeros_like(logits_TE[:, 0]), torch.zeros_like(map_TE[:, 0])
    for document, pool_E in enumerate(pool_DE):
        rows_N = (inputs.document_ids_T == document).nonzero().squeeze(1)
        masked_NE = logits_TE[rows_N].masked_fill(~pool_E, float("-inf"))
        keys_NE = masked_NE if scoring.startswith("softmax") else masked_NE.sigmoid()
        ranked_NE = keys_NE.detach().masked_fill(~pool_E, -1e30)
        order_NE = ranked_NE.sort(dim=-1, descending=True, stable=True)
        chosen_NK = order_NE.indices[:, : inputs.top_k]
        scores_NE = masked_NE.softmax(-1)
        if scoring == "sigmoid":
            scores_NE = keys_NE / keys_NE.sum(-1, True)
        weights_NK = scores_NE.gather(1, chosen_NK)
        if scoring != "softmax":
            # renormalised over the chosen
            weights_NK = weights_NK / weights_NK.sum(-1, True)
        probs_TE = probs_TE.index_put((rows_N[:, None], chosen_NK), weights_NK)
        map_TE[rows_N[:, None], chosen_NK] = True
        scores_TE = scores_TE.index_add(0, rows_N, scores_NE)
        z_T = z_T.index_add(0, rows_N, masked_NE.logsumexp(-1))
        is_clear_T[rows_N] = _is_clear(order_NE.values, inputs.top_k, pool_E.sum())
    return Expected(
        probs_TE=probs_TE,
        routing_map_TE=map_TE,
        tokens_per_expert_E=map_TE.sum(0),
        score_sums_E=scores_TE.sum(0),
        z_T=z_T,
        is_clear_T=is_clear_T,
    )


def _is_clear(sorted_NE: Tensor, top_k: int, pool_size: Tensor) -> Tensor:
    last_N, next_N = sorted_NE[:, top_k - 1], sorted_NE[:, min(top_k, sorted_NE.shape[1] - 1)]
    if pool_size == top_k:
        return torch.ones_like(last_N, dtype=torch.bool)
    # equal logits have equal keys everywhere, and go by their index
    return (last_N == next_N) | (last_N - next_N > CLOSE)
