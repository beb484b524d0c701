"""Inputs for the routing ops, and the ops again as a plain loop over documents and tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from emo_megatron.documents import DocumentSegments
from emo_megatron.ops.reference import Routing, document_scores, pool_topk, select_pool

# a document of each kind: ordinary, of one token, empty, long
LENGTHS = (5, 1, 0, 17, 2, 0, 8)


def random_logits(num_tokens: int, num_experts: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator) * 2


def segment(lengths: tuple[int, ...], *, padding: int = 0) -> DocumentSegments:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)])
    return DocumentSegments.from_cu_seqlens(cu_seqlens, num_tokens=sum(lengths) + padding)


def assert_equal(name: str, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{name}: {text}")


def assert_close(name: str, got: Tensor, want: Tensor, *, rtol: float = 1e-5) -> None:
    """Within `rtol` of the largest entry, as sums are."""
    atol = rtol * want.abs().max().item() if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")


@dataclass(frozen=True, kw_only=True)
class Options:
    top_k: int
    score_function: str = "softmax"
    pre_softmax: bool = True
    expert_bias_E: Tensor | None = None
    scaling_factor: float | None = None
    mask: str = "logits"

    def as_arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def best(values: list[float], count: int) -> list[int]:
    """Indices of the largest values, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def naive_pool(logits_TE: Tensor, size: int) -> list[int]:
    """The pool of one document, by index: sum the tokens' softmax, keep the best."""
    return sorted(best(logits_TE.double().softmax(-1).sum(0).tolist(), size))


def naive_token(logits_E: Tensor, pool: list[int], options: Options) -> dict[str, Tensor]:
    """Route one token: the paper's equations for the experts that may carry weight."""
    every = list(range(len(logits_E)))
    carrying = pool if options.mask == "logits" else every
    inside = logits_E[carrying]
    if options.score_function == "softmax":
        scores = (inside - inside.logsumexp(0)).exp()
        weights = scores if options.pre_softmax else inside
        keys = inside
    else:
        gates = 1 / (1 + (-inside).exp())
        if options.score_function == "sqrtsoftplus":
            gates = (inside.clamp(min=0) + (-inside.abs()).exp().log1p()).sqrt()
        scores, weights, keys = gates / gates.sum(), gates, gates
    if options.expert_bias_E is not None:
        keys = keys + options.expert_bias_E[carrying]
    allowed = [position for position, expert in enumerate(carrying) if expert in pool]
    chosen = [allowed[i] for i in best([keys[i].item() for i in allowed], options.top_k)]
    weights = weights[chosen]
    if options.score_function == "softmax" and not options.pre_softmax:
        weights = weights.softmax(0)
    if options.score_function != "softmax" and options.top_k > 1:
        weights = weights / weights.sum()
    experts = torch.tensor([carrying[position] for position in chosen])
    spread = torch.zeros_like(logits_E)
    return {
        "probs": spread.scatter(0, experts, weights * (options.scaling_factor or 1.0)),
        "map": spread.bool().scatter(0, experts, True),
        "scores": spread.scatter(0, torch.tensor(carrying), scores),
        "z": inside.logsumexp(0),
    }


def naive_routing(logits_TE: Tensor, ids_T: Tensor, sizes: list[int], options: Options) -> dict[str, Tensor]:
    """Route one document after the other; rows of padding stay zero."""
    tokens = {}
    for document, size in enumerate(sizes):
        rows = (ids_T == document).nonzero().squeeze(1).tolist()
        if rows:
            pool = naive_pool(logits_TE[rows].detach(), size)
            tokens |= {row: naive_token(logits_TE[row], pool, options) for row in rows}
    nothing = {
        "probs": torch.zeros_like(logits_TE[0]),
        "map": torch.zeros_like(logits_TE[0], dtype=torch.bool),
        "scores": torch.zeros_like(logits_TE[0]),
        "z": torch.zeros(()),
    }
    found = [tokens.get(row, nothing) for row in range(len(ids_T))]
    return {key: torch.stack([token[key] for token in found]) for key in nothing}


def route(logits_TE: Tensor, ids_T: Tensor, sizes: list[int], options: Options) -> Routing:
    scores_DE = document_scores(logits_TE, document_ids_T=ids_T, num_documents=len(sizes))
    sizes_D = torch.tensor(sizes, device=logits_TE.device)
    pool_DE = select_pool(scores_DE, pool_sizes_D=sizes_D)
    return pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, **options.as_arguments())
