"""Tests of emo_megatron.ops.reference, against a plain loop and by what must hold for any input."""

from dataclasses import fields, replace

import pytest
import torch
from support.routing import (
    LENGTHS,
    Options,
    assert_close,
    assert_equal,
    best,
    naive_routing,
    random_logits,
    route,
    segment,
)
from torch import Tensor

from emo_megatron.ops.reference import SCORE_FRACTION_BITS, Routing, document_scores, pool_topk, select_pool

ONE = 2**SCORE_FRACTION_BITS


VARIANTS = {
    "paper": Options(top_k=3),
    "one expert": Options(top_k=1),
    "scaled": Options(top_k=3, scaling_factor=2.5),
    "renormalised": Options(top_k=3, pre_softmax=False),
    "renormalised, one expert": Options(top_k=1, pre_softmax=False),
    "selection": Options(top_k=3, mask="selection"),
    "renormalised selection": Options(top_k=3, pre_softmax=False, mask="selection"),
    "sigmoid": Options(top_k=3, score_function="sigmoid"),
    "sigmoid, one expert": Options(top_k=1, score_function="sigmoid", scaling_factor=0.5),
    "sigmoid selection": Options(top_k=3, score_function="sigmoid", mask="selection"),
    "sigmoid, biased": Options(
        top_k=3, score_function="sigmoid", expert_bias_E=torch.linspace(-0.5, 0.5, 127)[torch.arange(127) * 37 % 127]
    ),
    "sqrtsoftplus": Options(top_k=3, score_function="sqrtsoftplus"),
    "sqrtsoftplus, one expert": Options(top_k=1, score_function="sqrtsoftplus", mask="selection", scaling_factor=0.5),
    "sqrtsoftplus, biased": Options(
        top_k=3,
        score_function="sqrtsoftplus",
        expert_bias_E=torch.linspace(-0.5, 0.5, 127)[torch.arange(127) * 37 % 127],
    ),
}


@pytest.mark.parametrize("num_experts", [5, 32, 127])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_a_plain_loop(variant: str, num_experts: int, device: torch.device) -> None:
    options = VARIANTS[variant]
    if options.expert_bias_E is not None:
        bias_E = options.expert_bias_E[:num_experts]
        options = replace(options, expert_bias_E=bias_E)
    ids_T = segment(LENGTHS, padding=3).document_ids_T
    # from the smallest pool a token can route in to one that holds more than all
    sizes = [options.top_k, 3, 4, num_experts // 2 + 1, num_experts + 9, 4, num_experts - 1]
    logits_TE = random_logits(len(ids_T), num_experts, seed=num_experts)
    generator = torch.Generator().manual_seed(1)
    upstream_TE, upstream_E, upstream_T = (
        torch.randn(shape, generator=generator) for shape in (logits_TE.shape, num_experts, 36)
    )

    wanted_TE = logits_TE.double().requires_grad_()
    want = naive_routing(wanted_TE, ids_T, sizes, options)
    loss = (want["probs"] * upstream_TE).sum() + want["scores"].sum(0) @ upstream_E.double()
    (loss + want["z"] @ upstream_T.double()).backward()

    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(options).items()}
    routed_TE = logits_TE.to(device).requires_grad_()
    got = route(routed_TE, ids_T.to(device), sizes, Options(**moved))
    loss = (got.probs_TE * upstream_TE.to(device)).sum() + got.score_sums_E @ upstream_E.to(device)
    (loss + got.z_T @ upstream_T.to(device)).backward()

    is_real_T1 = (ids_T >= 0)[:, None]
    assert_equal("routing_map", got.routing_map_TE.cpu() & is_real_T1, want["map"])
    assert_equal("tokens", got.tokens_per_expert_E.cpu(), want["map"].sum(0))
    assert_close("probs", got.probs_TE.cpu(), want["probs"].float())
    assert_close("score_sums", got.score_sums_E.cpu(), want["scores"].sum(0).float())
    assert_close("z", got.z_T.cpu(), want["z"].float())
    entropy = -torch.xlogy(want["scores"], want["scores"]).sum().item()
    assert got.entropy_sum.item() / ONE == pytest.approx(entropy, rel=1e-5)
    assert got.num_tokens == (ids_T >= 0).sum()
    assert_close("gradient", routed_TE.grad.cpu(), wanted_TE.grad.float())
    assert not got.counts_X.requires_grad
    assert got.tokens_per_expert_E.dtype == torch.int64


def test_document_scores_are_sums_of_probabilities(device: torch.device) -> None:
    ids_T = segment(LENGTHS, padding=4).document_ids_T
    logits_TE = random_logits(len(ids_T), 33)
    got_DE = document_scores(
        logits_TE.to(device).requires_grad_(), document_ids_T=ids_T.to(device), num_documents=len(LENGTHS)
    ).cpu()
    assert got_DE.dtype == torch.int64
    assert not got_DE.requires_grad
    for document, length in enumerate(LENGTHS):
        want_E = logits_TE[ids_T == document].double().softmax(-1).sum(0) * ONE
        # half a unit of rounding a token, and the last bits of the float32 softmax
        assert (got_DE[document] - want_E).abs().max() <= length * (0.5 + ONE * 2**-22)
        assert abs(got_DE[document].sum().item() - length * ONE) <= length * 33 * ONE * 2**-22


def test_document_scores_do_not_depend_on_order_or_shards(device: torch.device) -> None:
    ids_T = segment(LENGTHS, padding=4).document_ids_T.to(device)
    logits_TE = random_logits(len(ids_T), 127).to(device)

    def scores_of(rows: Tensor) -> Tensor:
        return document_scores(logits_TE[rows], document_ids_T=ids_T[rows], num_documents=len(LENGTHS))

    everything = torch.arange(len(ids_T), device=device)
    want_DE = scores_of(everything)
    for seed in range(5):
        order = torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(seed)).to(device)
        assert_equal("permuted", scores_of(order), want_DE)
        shards = order.tensor_split([0, 3, 4, 20])
        assert_equal("summed shards", sum(scores_of(shard) for shard in shards), want_DE)


def test_document_scores_of_a_certain_token_are_one() -> None:
    logits_TE = torch.full((3, 4), -1e4).index_fill(1, torch.tensor([2]), 1e4)
    scores_DE = document_scores(logits_TE, document_ids_T=torch.zeros(3).long(), num_documents=1)
    assert scores_DE.tolist() == [[0, 0, 3 * ONE, 0]]


def test_document_scores_are_rounded_to_the_nearest_unit() -> None:
    # 2**27 / 48 is 2796202.67
    scores_DE = document_scores(torch.zeros(2, 48), document_ids_T=torch.zeros(2).long(), num_documents=1)
    assert scores_DE.tolist() == [[2 * 2796203] * 48]


def test_no_tokens_and_no_documents() -> None:
    nothing = torch.empty(0, 5)
    ids_T = torch.empty(0, dtype=torch.int64)
    scores_DE = document_scores(nothing, document_ids_T=ids_T, num_documents=2)
    assert scores_DE.tolist() == [[0] * 5] * 2
    pool_DE = select_pool(scores_DE, pool_sizes_D=torch.tensor([2, 9]))
    routing = pool_topk(nothing, document_ids_T=ids_T, pool_DE=pool_DE, top_k=2)
    assert routing.probs_TE.shape == (0, 5)
    assert routing.tokens_per_expert_E.tolist() == [0] * 5
    only_padding = pool_topk(
        random_logits(3, 5), document_ids_T=torch.full((3,), -1), pool_DE=torch.empty(0, 5, dtype=torch.bool), top_k=2
    )
    assert only_padding.routing_map_TE.sum(1).tolist() == [2] * 3
    assert not only_padding.probs_TE.any()
    assert not only_padding.tokens_per_expert_E.any()
    none_DE = select_pool(torch.empty(0, 5).long(), pool_sizes_D=torch.empty(0).long())
    assert none_DE.shape == (0, 5)


@pytest.mark.parametrize("num_forced", [0, 1, 4])
@pytest.mark.parametrize("num_experts", [5, 31, 64, 127])
def test_select_pool(num_experts: int, num_forced: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    # few distinct scores, so that ties decide
    scores_DE = torch.randint(0, 4, (40, num_experts), generator=generator) * ONE
    sizes_D = torch.randint(1, num_experts + 5, (40,), generator=generator)
    got_DE = select_pool(scores_DE.to(device), pool_sizes_D=sizes_D.to(device), num_forced=num_forced).cpu()
    num_free = num_experts - num_forced
    for document, size in enumerate(sizes_D.tolist()):
        free = best(scores_DE[document, :num_free].tolist(), max(size - num_forced, 0))
        want = sorted(free) + list(range(num_free, num_experts))
        assert got_DE[document].nonzero().squeeze(1).tolist() == want
        assert len(want) == min(max(size, num_forced), num_experts)


def test_select_pool_tells_large_sums_apart() -> None:
    # neighbours beyond what a float64 can hold
    scores_DE = torch.tensor([[2**60, 2**60 + 1, 2**60 + 2]])
    assert select_pool(scores_DE, pool_sizes_D=torch.tensor([1])).tolist() == [[False, False, True]]


@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_excluded_experts_never_win(score_function: str, pre_softmax: bool) -> None:
    # the pool's probabilities underflow to the same 0 that excluded experts have
    logits_TE = torch.tensor([[300.0, 200.0, -300.0, -301.0, -302.0, 100.0]])
    pool_DE = torch.tensor([[False, False, True, True, True, False]])
    bias_E = torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0, 9.0]) if score_function == "sigmoid" else None
    for mask in ("logits", "selection"):
        routing = pool_topk(
            logits_TE,
            pool_DE=pool_DE,
            top_k=3,
            score_function=score_function,
            pre_softmax=pre_softmax,
            expert_bias_E=bias_E,
            mask=mask,
        )
        assert_equal("routing_map", routing.routing_map_TE, pool_DE)
        assert torch.isfinite(routing.probs_TE).all()


def test_experts_are_ranked_by_what_their_weight_is_made_of() -> None:
    # far below the best, probabilities are all 0 in float32 and tie; the logits do not
    logits_TE = torch.tensor([[300.0, -2.0, -1.0, 0.0]])
    by_probability = pool_topk(logits_TE, top_k=2).routing_map_TE
    assert by_probability.tolist() == [[True, True, False, False]]
    by_logit = pool_topk(logits_TE, top_k=2, pre_softmax=False).routing_map_TE
    assert by_logit.tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_ties_go_to_the_lower_index(score_function: str, pre_softmax: bool) -> None:
    # more than sixteen experts: an unstable sort keeps the order of few
    pool_DE = torch.ones(1, 100, dtype=torch.bool)
    pool_DE[0, [0, 2, 40]] = False
    options = {"score_function": score_function, "pre_softmax": pre_softmax}
    routing = pool_topk(torch.zeros(3, 100), pool_DE=pool_DE, top_k=4, **options)
    for row in routing.routing_map_TE:
        assert row.nonzero().squeeze(1).tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("has_pools", [True, False])
def test_padding_weighs_nothing_and_counts_nowhere(device: torch.device, has_pools: bool) -> None:
    ids_T = torch.tensor([1, -1, 1, 2, -1, 2, -1], device=device)
    logits_TE = random_logits(7, 12).to(device)
    is_padding_T = ids_T < 0
    pool_DE = torch.rand(3, 12, generator=torch.Generator().manual_seed(5)).to(device) < 0.7
    # an empty document's pool may be empty, and must not turn padding into NaN
    pool_DE[0] = False
    pool_DE = pool_DE if has_pools else None
    real_TE = logits_TE[~is_padding_T].requires_grad_()
    want = pool_topk(real_TE, document_ids_T=ids_T[~is_padding_T], pool_DE=pool_DE, top_k=3)
    padded_TE = logits_TE.clone().requires_grad_()
    got = pool_topk(padded_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=3)
    for name in ("probs_TE", "routing_map_TE", "z_T"):
        assert_equal(name, getattr(got, name)[~is_padding_T], getattr(want, name))
        if name != "routing_map_TE":
            assert not getattr(got, name)[is_padding_T].any()
    # dispatchers count on top-k rows a token
    assert got.routing_map_TE.sum(1).eq(3).all()
    assert_equal("counts", got.counts_X, want.counts_X)
    assert_close("score_sums", got.score_sums_E, want.score_sums_E, rtol=1e-6)
    weight_E = torch.arange(12.0, device=device)
    for routing in (got, want):
        loss = (routing.probs_TE @ weight_E).sum() + routing.score_sums_E @ weight_E
        (loss + routing.z_T.sum()).backward()
    assert_equal("gradient", padded_TE.grad[~is_padding_T], real_TE.grad)
    assert not padded_TE.grad[is_padding_T].any()


def test_routing_does_not_depend_on_shards() -> None:
    ids_T = segment(LENGTHS).document_ids_T
    logits_TE = random_logits(len(ids_T), 33)
    pool_DE = select_pool(
        document_scores(logits_TE, document_ids_T=ids_T, num_documents=len(LENGTHS)),
        pool_sizes_D=torch.full((len(LENGTHS),), 9),
    )
    whole = pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=4)
    order = torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(1))
    parts = [
        (rows, pool_topk(logits_TE[rows], document_ids_T=ids_T[rows], pool_DE=pool_DE, top_k=4))
        for rows in order.tensor_split([5, 6, 20])
    ]
    for rows, part in parts:
        assert_equal("probs", part.probs_TE, whole.probs_TE[rows])
        assert_equal("routing_map", part.routing_map_TE, whole.routing_map_TE[rows])
        assert_equal("z", part.z_T, whole.z_T[rows])
    assert_equal("counts", sum(part.counts_X for _, part in parts), whole.counts_X)


def test_bf16_logits_are_routed_in_float32() -> None:
    ids_T = segment(LENGTHS).document_ids_T
    logits_TE = random_logits(len(ids_T), 32).bfloat16()
    options = Options(top_k=4)
    sizes = [9] * len(LENGTHS)
    scores_of = {"document_ids_T": ids_T, "num_documents": len(sizes)}
    want_DE = document_scores(logits_TE.float(), **scores_of)
    assert_equal("scores", document_scores(logits_TE, **scores_of), want_DE)
    got = route(logits_TE, ids_T, sizes, options)
    want = route(logits_TE.float(), ids_T, sizes, options)
    assert got.probs_TE.dtype == torch.bfloat16
    assert got.score_sums_E.dtype == got.z_T.dtype == torch.float32
    assert_equal("routing_map", got.routing_map_TE, want.routing_map_TE)
    assert_equal("probs", got.probs_TE, want.probs_TE.bfloat16())
    for name in ("score_sums_E", "z_T", "counts_X"):
        assert_equal(name, getattr(got, name), getattr(want, name))


def test_one_pool_for_all_tokens_needs_no_documents() -> None:
    logits_TE = random_logits(6, 10)
    pool_DE = torch.arange(10).expand(1, 10) % 2 == 0
    want = pool_topk(logits_TE, document_ids_T=torch.zeros(6, dtype=torch.int64), pool_DE=pool_DE, top_k=2)
    got = pool_topk(logits_TE, pool_DE=pool_DE, top_k=2)
    for field in fields(Routing):
        assert_equal(field.name, getattr(got, field.name), getattr(want, field.name))
    with pytest.raises(ValueError, match="one row when document_ids_T is None; got 2 rows"):
        pool_topk(logits_TE, pool_DE=pool_DE.expand(2, 10), top_k=2)
