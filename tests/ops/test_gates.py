"""Gates and sums of each document: the reference against float64, the compiled ops against the reference."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from support.emulator import Compiled
from support.routing import assert_close, assert_equal, random_logits
from torch import Tensor

from emo_megatron.ops import reference
from emo_megatron.ops.reference import SCORE_FRACTION_BITS, Routing
from emo_megatron.ops.reference_documents import MAX_GATE_UNITS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ONE = 2**SCORE_FRACTION_BITS
INF = torch.inf
GATES = pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])


def exact_gates(logits_TE: Tensor, score_function: str) -> Tensor:
    """In float64, differentiable wherever float32 logits may lie."""
    if score_function == "sigmoid":
        return logits_TE.sigmoid()
    is_low_TE, is_high_TE = logits_TE < -40, logits_TE > 300
    between_TE = logits_TE.masked_fill(is_low_TE | is_high_TE, 0.0)
    high_TE = logits_TE.masked_fill(~is_high_TE, 1.0)
    softplus_TE = torch.where(is_high_TE, high_TE, between_TE.exp().log1p())
    low_TE = logits_TE.masked_fill(~is_low_TE, 0.0)
    return torch.where(is_low_TE, (low_TE / 2).exp(), softplus_TE.sqrt())


EXTREMES = [-1e30, -1e4, -300, -150, -100, -41, -21, -20, -19, -9, 0, 9, 20, 21, 64, 90, 1e4, 1e30]
"""Values of the third expert of a token each."""


@GATES
def test_gradients_of_extreme_logits(implementation: Compiled, score_function: str) -> None:
    ops, device = implementation.ops, implementation.device
    num_tokens, num_experts, top_k = len(EXTREMES) + 3, 40, 3
    logits_TE = random_logits(num_tokens, num_experts)
    logits_TE[: len(EXTREMES), 2] = torch.tensor(EXTREMES)
    logits_TE[-3, ::2] = -INF
    logits_TE[-2] -= 60
    logits_TE[-1] = logits_TE[-1] * 0 - 30  # all alike
    weight_TE, weight_E = random_logits(num_tokens, num_experts, seed=1), random_logits(1, 40)[0]

    leaf_TE = logits_TE.to(device).requires_grad_()
    bias_E = torch.zeros(num_experts, device=device)
    bias_E[2] = 50.0  # chosen, whatever it is
    got = ops.pool_topk(leaf_TE, top_k=top_k, score_function=score_function, expert_bias_E=bias_E)
    loss = (got.probs_TE * weight_TE.to(device)).sum() + got.score_sums_E @ weight_E.to(device)
    loss.backward()
    map_TE, grad_TE = got.routing_map_TE.cpu(), leaf_TE.grad.cpu()
    assert map_TE[:-1, 2].all()
    assert grad_TE.isfinite().all()

    exact_TE = logits_TE.double().masked_fill(logits_TE == -INF, -1e30).requires_grad_()
    gates_TE = exact_gates(exact_TE, score_function)
    scores_TE = gates_TE / (gates_TE.sum(dim=1, keepdim=True) + 1e-20)
    chosen_TE = gates_TE * map_TE
    probs_TE = chosen_TE / (chosen_TE.sum(dim=1, keepdim=True) + 1e-20)
    (want_TE,) = torch.autograd.grad((probs_TE * weight_TE).sum() + scores_TE.sum(dim=0) @ weight_E.double(), exact_TE)
    assert_close("probs", got.probs_TE.detach().cpu(), probs_TE.detach().float(), rtol=1e-6)
    scale_T1 = want_TE.abs().amax(dim=1, keepdim=True)
    assert ((grad_TE - want_TE).abs() <= 2e-6 * scale_T1).all()
    # also of what is small beside the others; a sigmoid of almost 1 leaves no digits to a float
    want_T, got_T = want_TE[:, 2], grad_TE[:, 2].double()
    is_told_T = (want_T.abs() > 1e-30) & ((score_function != "sigmoid") | (logits_TE[:, 2] < 0))
    assert is_told_T.sum() >= 7
    assert ((got_T - want_T).abs() <= 1e-4 * want_T.abs())[is_told_T].all()


@GATES
@pytest.mark.parametrize("num_experts", [5, 40, 200])
def test_document_scores_are_sums_of_gates(implementation: Compiled, score_function: str, num_experts: int) -> None:
    ops, device = implementation.ops, implementation.device
    logits_TE = random_logits(150, num_experts)
    logits_TE[::7] *= 9
    logits_TE[3, 1], logits_TE[9] = -INF, -200.0
    generator = torch.Generator().manual_seed(2)
    ids_T = torch.randint(-1, 4, (150,), generator=generator)
    ids_T[ids_T == 2] = 1  # nobody is of the third document

    def scores_of(rows: Tensor, ids_T: Tensor = ids_T) -> Tensor:
        found: Tensor = ops.document_scores(
            logits_TE[rows].to(device),
            document_ids_T=ids_T[rows].to(device),
            num_documents=4,
            score_function=score_function,
        )
        return found.cpu()

    everything = torch.arange(150)
    got_DE = scores_of(everything)
    gates_TE = exact_gates(logits_TE.double(), score_function).clamp(max=8.0)
    for document in range(4):
        is_its_T = ids_T == document
        want_E = gates_TE[is_its_T].sum(dim=0) * ONE
        bound_E = want_E * 2.0**-21 + is_its_T.sum()
        assert ((got_DE[document] - want_E).abs() <= bound_E).all()
    # the same bits in whatever order and pieces, and for one document alone
    order = torch.randperm(150, generator=generator)
    assert_equal("order", scores_of(order), got_DE)
    pieces = sum(scores_of(rows) for rows in order.tensor_split([1, 60, 61]))
    assert_equal("pieces", pieces, got_DE)
    assert_equal("sorted", scores_of(ids_T.argsort()), got_DE)
    total_E = got_DE.sum(dim=0)
    together_DE = scores_of((ids_T >= 0).nonzero()[:, 0], torch.zeros_like(ids_T))
    assert_equal("together", together_DE[0], total_E)


@pytest.mark.parametrize("num_documents", [1, 3])
def test_a_large_gate_counts_as_the_largest_one(implementation: Compiled, num_documents: int) -> None:
    ops, device = implementation.ops, implementation.device
    ids_T = torch.arange(600) // 40 % num_documents
    got_DE = ops.document_scores(
        torch.tensor([63.0, 64.1, 200.0, 1e6, 3e38, -3e38]).expand(600, -1).contiguous().to(device),
        document_ids_T=ids_T.to(device),
        num_documents=num_documents,
        score_function="sqrtsoftplus",
    ).cpu()
    tokens_D1 = torch.bincount(ids_T)[:, None]
    below_D = got_DE[:, 0] / tokens_D1[:, 0] / ONE
    assert below_D.tolist() == pytest.approx([63.0**0.5] * num_documents, rel=1e-6)
    assert_equal("limit", got_DE[:, 1:5], (MAX_GATE_UNITS * tokens_D1).expand(-1, 4))
    assert not got_DE[:, 5].any()


LENGTHS = (5, 1, 0, 17, 2, 0, 8, 1, 1, 40)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"top_k": 4},
    "renormalised": {"top_k": 3, "pre_softmax": False, "scaling_factor": 2.5},
    "sigmoid selection": {"top_k": 4, "score_function": "sigmoid", "mask": "selection"},
    "sqrtsoftplus": {"top_k": 4, "score_function": "sqrtsoftplus"},
}
DOCUMENTS: dict[str, tuple[tuple[int, ...], int, bool, int]] = {
    # lengths, padding, whether tokens are shuffled, experts
    "of each kind": (LENGTHS, 3, False, 40),
    "shuffled": (LENGTHS, 3, True, 130),
    "many experts": ((6, 0, 9), 1, False, 1024),
    "one": ((300,), 0, False, 12),
    "one and padding": ((140,), 9, True, 33),
    "of one token": ((1,) * 70, 0, False, 40),
    "long ones": ((260, 130, 300), 0, False, 5),
    "a second one within the last warp of a block": ((38, 42), 0, False, 64),
    "padding only": ((0, 0), 7, False, 40),
    "none": ((), 4, False, 40),
}


def ids_of(documents: str) -> Tensor:
    lengths, padding, is_shuffled, _ = DOCUMENTS[documents]
    ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    ids_T = torch.cat([ids_T, ids_T.new_full((padding,), -1)])
    order = torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(4))
    return ids_T[order] if is_shuffled else ids_T


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_each_document(implementation: Compiled, documents: str, variant: str) -> None:
    """They are those of a call with the document's tokens alone, and nothing else changes."""
    ops, device = implementation.ops, implementation.device
    num_documents, num_experts = len(DOCUMENTS[documents][0]), DOCUMENTS[documents][3]
    ids_T = ids_of(documents).to(device)
    leaf_TE = random_logits(len(ids_T), num_experts).to(device).requires_grad_()
    pool_DE = random_logits(num_documents, num_experts, seed=1).to(device) > -0.5
    pool_DE[:, :4] = True

    def route(rows: Tensor, **more: Any) -> Routing:
        found: Routing = ops.pool_topk(
            leaf_TE[rows], document_ids_T=ids_T[rows], pool_DE=pool_DE, **VARIANTS[variant], **more
        )
        return found

    everything = torch.arange(len(ids_T), device=device)
    got, plain = route(everything, num_documents=num_documents), route(everything)
    for field in fields(Routing):
        if field.name not in ("score_sums_RE", "document_choices_DE"):
            assert_equal(field.name, getattr(got, field.name), getattr(plain, field.name))
    assert got.score_sums_RE.shape == got.document_choices_DE.shape == (num_documents, num_experts)
    assert plain.document_choices_DE.shape == (0, num_experts)
    assert not got.document_choices_DE.requires_grad
    alone = [route((ids_T == document).nonzero()[:, 0]) for document in range(num_documents)]
    for document, its in enumerate(alone):
        if ops is reference:  # sums of floats
            want_E, got_E = its.score_sums_E, got.score_sums_RE[document]
            assert_close("scores", got_E, want_E, rtol=1e-6)
        else:
            assert_equal("scores", got.score_sums_RE[document], its.score_sums_E)
        assert_equal("choices", got.document_choices_DE[document], its.tokens_per_expert_E)
    if not num_documents:
        return

    # each token's scores take the gradient of its document's row
    upstream_DE = random_logits(num_documents, num_experts, seed=2).to(device)
    (grad_TE,) = torch.autograd.grad([got.score_sums_RE, got.z_T], leaf_TE, [upstream_DE, torch.ones_like(got.z_T)])
    weighted = [(its.score_sums_E * row_E).sum() for its, row_E in zip(alone, upstream_DE, strict=True)]
    loss = sum(weighted) + sum(its.z_T.sum() for its in alone)
    (want_TE,) = torch.autograd.grad(loss, leaf_TE)
    assert_close("gradient", grad_TE, want_TE, rtol=1e-6 if ops is reference else 0.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_compiled_sums_of_each_document_are_the_references(compiled: Compiled, variant: str) -> None:
    ids_T = ids_of("shuffled")
    num_documents, num_experts = len(LENGTHS), 130
    routed = []
    for ops, device in ((reference, torch.device("cpu")), (compiled.ops, compiled.device)):
        leaf_TE = random_logits(len(ids_T), num_experts).to(device).requires_grad_()
        got = ops.pool_topk(leaf_TE, document_ids_T=ids_T.to(device), num_documents=num_documents, **VARIANTS[variant])
        weight_DE = random_logits(num_documents, num_experts, seed=3).to(device)
        loss = (got.score_sums_RE * weight_DE).sum() + got.probs_TE.square().sum()
        loss.backward()
        routed.append((got.score_sums_RE.cpu(), got.document_choices_DE.cpu(), leaf_TE.grad.cpu()))
    (want_sums_DE, want_choices_DE, want_TE), (sums_DE, choices_DE, grad_TE) = routed
    assert_close("scores", sums_DE, want_sums_DE, rtol=1e-6)
    assert_equal("choices", choices_DE, want_choices_DE)
    assert_close("gradient", grad_TE, want_TE, rtol=1e-6)


def test_ids_past_the_last_document_have_no_sums(compiled: Compiled) -> None:
    """The host refuses them; a GPU cannot look without waiting, so there they are padding."""
    logits_TE = random_logits(40, 20).to(compiled.device).requires_grad_()
    ids_T = torch.arange(40, device=compiled.device) // 10
    options = {"document_ids_T": ids_T, "num_documents": 3, "top_k": 2}
    if compiled.is_checked:
        with pytest.raises(RuntimeError, match="below the number of documents, 3; got 3"):
            compiled.ops.pool_topk(logits_TE, **options)
        return
    got = compiled.ops.pool_topk(logits_TE, **options)
    padded = {**options, "document_ids_T": ids_T.masked_fill(ids_T == 3, -1)}
    want = compiled.ops.pool_topk(logits_TE, **padded)
    for field in fields(Routing):
        assert_equal(field.name, getattr(got, field.name), getattr(want, field.name))
    grads = [torch.autograd.grad(routing.score_sums_RE.square().sum(), logits_TE)[0] for routing in (got, want)]
    assert_equal("gradient", *grads)


def test_tokens_that_do_not_count_are_in_no_documents_sums(implementation: Compiled) -> None:
    ops, device = implementation.ops, implementation.device
    logits_TE = random_logits(60, 20)
    logits_TE[::4, 3], logits_TE[1::8] = torch.nan, -INF
    ids_T = torch.arange(60) // 13
    is_counted_T = logits_TE.amax(dim=1).isfinite()
    options = {"top_k": 2, "num_documents": 6, "score_function": "sqrtsoftplus"}
    found = [
        ops.pool_topk(logits_TE[rows].to(device), document_ids_T=ids_T[rows].to(device), **options)
        for rows in (torch.arange(60), is_counted_T.nonzero()[:, 0])
    ]
    assert_close("scores", found[0].score_sums_RE, found[1].score_sums_RE, rtol=1e-6)
    assert_equal("choices", found[0].document_choices_DE, found[1].document_choices_DE)
    assert found[0].document_choices_DE.sum() == 2 * is_counted_T.sum()


@pytest.mark.parametrize("score_function", ["softmax", "sqrtsoftplus"])
def test_sums_of_documents_whose_tokens_keep_to_groups(compiled: Compiled, score_function: str) -> None:
    ids_T = torch.tensor([0] * 70 + [-1] * 3 + [2] * 41 + [3] + [0] * 9)
    logits_TE = random_logits(len(ids_T), 48)
    logits_TE[5, 1] = float("nan")
    pool_DE = random_logits(4, 48, seed=1) > 0.3
    pool_DE[:, ::11] = True
    pool_DE[2] = torch.arange(48) % 9 == 0  # one expert a group

    def route(ops: Any, device: torch.device) -> Routing:
        found: Routing = ops.pool_topk(
            logits_TE.to(device),
            document_ids_T=ids_T.to(device),
            pool_DE=pool_DE.to(device),
            top_k=4,
            score_function=score_function,
            num_groups=6,
            group_topk=2,
            num_documents=4,
        )
        return found

    got, want = route(compiled.ops, compiled.device), route(reference, torch.device("cpu"))
    assert_equal("map", got.routing_map_TE.cpu(), want.routing_map_TE)
    assert_equal("counts", got.counts_X[:-1].cpu(), want.counts_X[:-1])
    assert_equal("choices", got.document_choices_DE.cpu(), want.document_choices_DE)
    assert want.num_over_groups > 0
    assert_close("scores", got.score_sums_RE.cpu(), want.score_sums_RE, rtol=1e-6)
