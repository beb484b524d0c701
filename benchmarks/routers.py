"""The routers that bench_routing.py times, their input, and the check that all routers give the same routing.

T tokens, E experts, K experts per token, D documents. Every router returns the weights of the experts, their map and
the sum of a balance and a z loss; the gradient of a step comes from the weights and the losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from timing import Step
from torch import Tensor

from emo_megatron import balance, ops
from emo_megatron.documents import DocumentSegments
from emo_megatron.ops.groups import open_experts

# no influence on time; large enough for the check to see a wrong gradient of either
BALANCE_COEFFICIENT = 1.0
Z_COEFFICIENT = 0.1
CLEAR_GAP = 1e-5
"""Where the deciding logits are closer than that, two routers may round to different choices."""
NUM_SPARE = 0.01
"""Largest share of tokens that may be that close."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of one case."""

    num_tokens: int
    num_experts: int
    top_k: int
    num_documents: int

    def __str__(self) -> str:
        return f"T={self.num_tokens} E={self.num_experts} K={self.top_k} D={self.num_documents}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Input of one step, the same for every router."""

    shape: Shape
    logits_TE: Tensor
    """[T, E] float32, without ties that decide a pool."""
    document_ids_T: Tensor
    bounds: list[int]
    """[D + 1] first token of each document, and T."""
    sizes: list[int]
    """[D] pool sizes on the host, as a loop over documents draws them."""
    sizes_D: Tensor
    num_tokens: Tensor
    """[] int64, T on the device."""
    upstream_TE: Tensor
    """[T, E] gradient of the weights."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a router answers."""

    probs_TE: Tensor
    routing_map_TE: Tensor
    loss: Tensor
    """[] float32, differentiable."""


Router = Callable[[Tensor, Case], Routed]
Groups = tuple[int, int]
"""Groups of experts, and how many of them a token uses."""


def make_case(shape: Shape, *, device: torch.device, seed: int = 0) -> Case:
    """Random documents whose tokens share a taste for some experts; pool sizes uniform in [K, E]."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_experts = shape.num_tokens, shape.num_experts
    cuts = torch.randperm(num_tokens - 1, generator=generator)[: shape.num_documents - 1] + 1
    bounds = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([num_tokens])])
    ids_T = DocumentSegments.from_cu_seqlens(bounds, num_tokens=num_tokens).document_ids_T
    taste_DE = torch.randn(shape.num_documents, num_experts, generator=generator)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator) + taste_DE[ids_T]
    drawn_D = torch.randint(shape.top_k, num_experts + 1, (shape.num_documents,), generator=generator)
    sizes_D = _clear_sizes(logits_TE, ids_T, drawn_D)
    upstream_TE = torch.randn(num_tokens, num_experts, generator=generator) / num_tokens
    return Case(
        shape=shape,
        logits_TE=logits_TE.to(device),
        document_ids_T=ids_T.to(device),
        bounds=bounds.tolist(),
        sizes=sizes_D.tolist(),
        sizes_D=sizes_D.to(device),
        num_tokens=torch.tensor(num_tokens, device=device),
        upstream_TE=upstream_TE.to(device),
    )


def _clear_sizes(logits_TE: Tensor, ids_T: Tensor, drawn_D: Tensor) -> Tensor:
    """The drawn sizes, a little larger where the last expert inside and the first outside score the same."""
    num_documents, num_experts = len(drawn_D), logits_TE.shape[1]
    sums_DE = torch.zeros(num_documents, num_experts, dtype=torch.float64)
    sums_DE.index_add_(0, ids_T, logits_TE.softmax(-1).double())
    sorted_DE = sums_DE.sort(dim=-1, descending=True).values
    sizes = torch.arange(1, num_experts)
    is_clear_DE = sorted_DE[:, :-1] - sorted_DE[:, 1:] > CLEAR_GAP * sorted_DE[:, :-1]
    usable_DE = is_clear_DE & (sizes >= drawn_D[:, None])
    return torch.where(usable_DE, sizes, num_experts).amin(dim=-1)


def pools_of(case: Case, backend: ops.Backend) -> Tensor:
    """[D, E] bool."""
    scores_DE = ops.document_scores(
        case.logits_TE, document_ids_T=case.document_ids_T, num_documents=case.shape.num_documents, backend=backend
    )
    return ops.select_pool(scores_DE, pool_sizes_D=case.sizes_D, backend=backend)


def pool_router(backend: ops.Backend, *, has_pools: bool = True, groups: Groups | None = None) -> Router:
    """This package's ops, with the losses of PoolRouter on one rank; without pools the standard router."""
    limits = {} if groups is None else {"num_groups": groups[0], "group_topk": groups[1]}

    def route(logits_TE: Tensor, case: Case) -> Routed:
        routed = ops.pool_topk(
            logits_TE,
            document_ids_T=case.document_ids_T,
            pool_DE=pools_of(case, backend) if has_pools else None,
            top_k=case.shape.top_k,
            **limits,
            backend=backend,
        )
        counts = balance.TokenCounts(tokens_per_expert_E=routed.tokens_per_expert_E, num_tokens=case.num_tokens)
        balance_loss = balance.load_balancing_loss(
            routed.score_sums_E, fraction=counts, population=counts, top_k=case.shape.top_k
        )
        z_loss = balance.z_loss(routed.z_T, population=counts)
        return Routed(
            probs_TE=routed.probs_TE,
            routing_map_TE=routed.routing_map_TE,
            loss=BALANCE_COEFFICIENT * balance_loss + Z_COEFFICIENT * z_loss,
        )

    return route


def route_by_loop(logits_TE: Tensor, case: Case) -> Routed:
    """The paper's section 3 as one writes it down: one document after the other."""
    shape = case.shape
    probs, maps, z = [], [], []
    score_sums_E = torch.zeros_like(logits_TE[0])
    for (start, end), size in zip(pairwise(case.bounds), case.sizes, strict=True):
        document_NE = logits_TE[start:end]
        with torch.no_grad():
            mean_E = document_NE.softmax(dim=-1).mean(dim=0)
            is_outside_E = torch.ones_like(mean_E, dtype=torch.bool)
            is_outside_E[mean_E.topk(size).indices] = False
        masked_NE = document_NE.masked_fill(is_outside_E, float("-inf"))
        scores_NE = masked_NE.softmax(dim=-1)
        weights_NK, experts_NK = scores_NE.topk(shape.top_k)
        probs.append(torch.zeros_like(scores_NE).scatter(1, experts_NK, weights_NK))
        maps.append(torch.zeros_like(scores_NE, dtype=torch.bool).scatter(1, experts_NK, True))
        score_sums_E = score_sums_E + scores_NE.sum(dim=0)
        z.append(masked_NE.logsumexp(dim=-1))
    routing_map_TE = torch.cat(maps)
    fraction_E = routing_map_TE.sum(dim=0) / (shape.num_tokens * shape.top_k)
    balance_loss = shape.num_experts * (fraction_E * score_sums_E / shape.num_tokens).sum()
    return Routed(
        probs_TE=torch.cat(probs),
        routing_map_TE=routing_map_TE,
        loss=BALANCE_COEFFICIENT * balance_loss + Z_COEFFICIENT * torch.cat(z).square().mean(),
    )


def stock_router(*, fused: bool) -> Router:
    """What Megatron's TopKRouter computes without pools, from its own functions; fused: by Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    def route(logits_TE: Tensor, case: Case) -> Routed:
        shape = case.shape
        z_loss = moe_utils.z_loss_func(logits_TE, Z_COEFFICIENT)
        probs_TE, routing_map_TE = moe_utils.topk_routing_with_score_function(
            logits_TE, shape.top_k, use_pre_softmax=True, fused=fused
        )
        map_TE, scores_TE = moe_utils.compute_routing_scores_for_aux_loss(
            logits_TE, shape.top_k, "softmax", fused=fused
        )
        balance_loss = moe_utils.switch_load_balancing_loss_func(
            probs=scores_TE,
            tokens_per_expert=map_TE.sum(dim=0),
            total_num_tokens=shape.num_tokens,
            topk=shape.top_k,
            num_experts=shape.num_experts,
            moe_aux_loss_coeff=BALANCE_COEFFICIENT,
            fused=fused,
        )
        return Routed(probs_TE=probs_TE, routing_map_TE=routing_map_TE, loss=balance_loss + z_loss)

    return route


def step_of(router: Router, case: Case) -> Step:
    """Forward as in training, with a graph; backward from the weights and the losses."""

    def forward() -> tuple[Tensor, Routed]:
        leaf_TE = case.logits_TE.detach().requires_grad_()
        return leaf_TE, router(leaf_TE, case)

    return Step(forward=forward, backward=lambda state: gradient(*state, case))


def gradient(leaf_TE: Tensor, routed: Routed, case: Case) -> Tensor:
    """[T, E], of the logits."""
    (grad_TE,) = torch.autograd.grad(
        [routed.probs_TE, routed.loss], [leaf_TE], [case.upstream_TE, torch.ones_like(routed.loss)]
    )
    return grad_TE


def check(name: str, router: Router, case: Case, *, has_pools: bool, groups: Groups | None = None) -> None:
    """Compare weights, map, losses and gradient with the reference ops, where no near tie decides.

    Raises:
        ValueError: they differ: there is nothing to time.
    """
    want_router = pool_router("reference", has_pools=has_pools, groups=groups)
    want_leaf_TE, got_leaf_TE = (case.logits_TE.clone().requires_grad_() for _ in range(2))
    want, got = want_router(want_leaf_TE, case), router(got_leaf_TE, case)
    is_clear_T = _is_clear(case, has_pools=has_pools, groups=groups)
    close = 1 - is_clear_T.float().mean().item()
    problems = [f"{close:.2%} of the tokens are near ties"] if close > NUM_SPARE else []
    if not torch.equal(got.routing_map_TE[is_clear_T], want.routing_map_TE[is_clear_T]):
        problems.append("it chooses other experts")
    want_grad_TE = gradient(want_leaf_TE, want, case)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "weights": (got.probs_TE[is_clear_T], want.probs_TE[is_clear_T]),
        "losses": (got.loss, want.loss),
        "gradient": (gradient(got_leaf_TE, got, case)[is_clear_T], want_grad_TE[is_clear_T]),
    }
    for what, (got_X, want_X) in pairs.items():
        error = ((got_X - want_X).abs().max() / want_X.abs().max()).item()
        if not error < 1e-4:  # NaN is not below
            problems.append(f"its {what} differ by {error:.1e} of the largest")
    if problems:
        raise ValueError(
            f"{name} does not route as the reference does, so nothing is reported ({case.shape}): "
            + "; ".join(problems)
        )


def is_clear_choice(logits_TE: Tensor, *, top_k: int) -> Tensor:
    """[T] bool: the K-th and the next logit of the token, -inf outside its pool, are more than CLEAR_GAP apart."""
    if top_k == logits_TE.shape[1]:
        return torch.ones_like(logits_TE[:, 0], dtype=torch.bool)
    best_TK = logits_TE.topk(top_k + 1).values
    return best_TK[:, -2] - best_TK[:, -1] > CLEAR_GAP


def _is_clear(case: Case, *, has_pools: bool, groups: Groups | None) -> Tensor:
    """[T] bool: the K-th and the next logit of the token are apart, so every exact router chooses the same."""
    logits_TE, top_k = case.logits_TE, case.shape.top_k
    if has_pools:
        is_in_pool_TE = pools_of(case, "reference")[case.document_ids_T]
        logits_TE = logits_TE.masked_fill(~is_in_pool_TE, float("-inf"))
    if groups is None:
        return is_clear_choice(logits_TE, top_k=top_k)
    num_groups, group_topk = groups
    scores_TE = logits_TE.softmax(dim=-1)
    is_open_TE = open_experts(scores_TE, scores_TE > 0, num_groups=num_groups, group_topk=group_topk, top_k=top_k)
    in_groups_TGM = scores_TE.unflatten(1, (num_groups, -1))
    sums_TG = in_groups_TGM.topk(top_k // group_topk, dim=-1).values.sum(dim=-1)
    sums_TG = sums_TG.sort(dim=-1, descending=True).values
    # groups without experts of the pool tie, and come last
    is_apart_TG = sums_TG[:, :-1] - sums_TG[:, 1:] > CLEAR_GAP * sums_TG[:, :-1]
    is_apart_T = (is_apart_TG | (sums_TG[:, :-1] == 0)).all(dim=-1)
    open_TE = logits_TE.masked_fill(~is_open_TE, float("-inf"))
    return is_apart_T & is_clear_choice(open_TE, top_k=top_k)


def kernel_bytes(*, num_tokens: int, num_experts: int, num_documents: int, logit_bytes: int = 4) -> dict[str, int]:
    """Bytes that each compiled op must read and write if every tensor moves once: the floor of its time.

    Args:
        num_tokens, num_experts, num_documents: T, E, D.
        logit_bytes: of a logit, and so of a weight and of a gradient.
    """
    entries, pool_entries = num_tokens * num_experts, num_documents * num_experts
    ids, logits, routing_map, z = 8 * num_tokens, logit_bytes * entries, entries, 4 * num_tokens
    used = 4 * num_documents * -(-num_experts // 32)
    return {
        "document_scores": logits + ids + 8 * pool_entries,
        "select_pool": 8 * pool_entries + 8 * num_documents + pool_entries,
        # logits, ids and pools in; weights, map and log-sum-exp out
        "pool_topk": logits + ids + pool_entries + logits + routing_map + z,
        # the gradients of weights and log-sum-exp, logits, map and ids in; the gradient of the logits out
        "pool_topk backward": logits + z + logits + routing_map + ids + logits,
        # for metrics
        "experts_used": routing_map + ids + used,
        "document_statistics": 8 * pool_entries + pool_entries + used,
    }


def bytes_moved(shape: Shape, *, with_backward: bool) -> int:
    """The floor of the compiled ops together, with float32 logits."""
    found = kernel_bytes(num_tokens=shape.num_tokens, num_experts=shape.num_experts, num_documents=shape.num_documents)
    kernels = ["document_scores", "select_pool", "pool_topk"]
    return sum(found[name] for name in kernels + ["pool_topk backward"] * with_backward)
