"""The compiled ops against the reference: CPU kernels, CUDA kernels run lane by lane on the CPU, and on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import pytest
import torch
from support.emulator import Compiled, host_ops, load_compiled
from support.routing import Options, assert_close, assert_equal, naive_token, random_logits
from torch import Tensor

from emo_megatron import ops
from emo_megatron.ops import native, reference
from emo_megatron.ops.native import NativeOps
from emo_megatron.ops.reference import SCORE_FRACTION_BITS, Routing

SUM_RTOL = 2.0**-21
"""Bound on document scores: they differ from the reference's by this share and a unit a token at most, from the last
bits of `exp` and the rounding to units. A pool may differ only where experts at its edge are closer than twice that."""
CHOICE_ATOL = 1e-6
"""A token's choice may differ only where what ranks its experts (logits; gates plus bias) is closer than this."""
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Weights and gradients, of the largest entry; the coarser dtypes round their last bit."""


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Logits and documents; the sizes of pools are drawn, from the smallest legal one to one larger than all."""

    lengths: tuple[int, ...] = (5, 1, 0, 17, 2, 0, 8, 1, 1, 40)
    padding: int = 3
    num_experts: int = 64
    top_k: int = 8
    dtype: torch.dtype = torch.float32
    num_forced: int = 0
    is_shuffled: bool = False
    scale: float = 2.0
    grad_rtol: float | None = None
    """Where the reference's own gradients are less exact than RTOL."""

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def logits(self) -> Tensor:
        tokens = sum(self.lengths) + self.padding
        return (random_logits(tokens, self.num_experts, seed=3) / 2 * self.scale).to(self.dtype)

    def document_ids(self) -> Tensor:
        ids_T = torch.full((sum(self.lengths) + self.padding,), -1)
        for document, end in enumerate(accumulate(self.lengths)):
            ids_T[end - self.lengths[document] : end] = document
        if self.is_shuffled:
            ids_T = ids_T[torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(4))]
        return ids_T

    def pool_sizes(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        low = max(self.top_k, self.num_forced)
        sizes_D = torch.randint(low, self.num_experts + 2, (self.num_documents,), generator=generator)
        if self.num_documents > 1:
            sizes_D[0], sizes_D[-1] = low, self.num_experts + 9
        return sizes_D


CASES = {
    "one expert": Case(num_experts=1, top_k=1),
    "fewer than lanes": Case(num_experts=5, top_k=3),
    "a whole warp": Case(num_experts=32, top_k=2),
    "one more": Case(num_experts=33, top_k=7),
    "64": Case(),
    "127": Case(num_experts=127, top_k=7),
    "128": Case(num_experts=128),
    "odd": Case(num_experts=251, top_k=8),
    "256": Case(num_experts=256, top_k=1),
    "512": Case(num_experts=512, top_k=8),
    "1000": Case(num_experts=1000, top_k=8, lengths=(6, 1, 9)),
    "1024, top-32": Case(num_experts=1024, top_k=32, lengths=(6, 1, 9)),
    "bfloat16": Case(num_experts=128, dtype=torch.bfloat16),
    "float16": Case(num_experts=96, dtype=torch.float16),
    "forced experts": Case(num_experts=40, top_k=3, num_forced=6),
    "all forced": Case(num_experts=12, top_k=3, num_forced=12),
    "one document": Case(lengths=(300,), padding=0),
    "one document and padding": Case(lengths=(140,), padding=9, is_shuffled=True),
    "documents of one token": Case(lengths=(1,) * 70, padding=0),
    "a document starts within the last warp of a block": Case(lengths=(38, 42), padding=0),
    "documents out of order": Case(lengths=(30, 40, 20, 60), is_shuffled=True),
    "padding only": Case(lengths=(0, 0), padding=7),
    "more than a token a warp": Case(lengths=(1500, 1, 700), num_experts=8, top_k=2),
    "far apart": Case(num_experts=128, scale=20.0, grad_rtol=3e-6),
    "all but equal": Case(num_experts=128, scale=1e-3),
}
BIAS_E = torch.linspace(-0.5, 0.5, 1024)[torch.arange(1024) * 37 % 1024]
VARIANTS = {
    "paper": Options(top_k=1),
    "scaled": Options(top_k=1, scaling_factor=2.5),
    "renormalised": Options(top_k=1, pre_softmax=False),
    "selection": Options(top_k=1, mask="selection"),
    "renormalised selection": Options(top_k=1, pre_softmax=False, mask="selection", scaling_factor=3.0),
    "sigmoid": Options(top_k=1, score_function="sigmoid"),
    "sigmoid selection": Options(top_k=1, score_function="sigmoid", mask="selection"),
    "sigmoid, biased": Options(top_k=1, score_function="sigmoid", expert_bias_E=BIAS_E),
    "sqrtsoftplus": Options(top_k=1, score_function="sqrtsoftplus", mask="selection"),
    "sqrtsoftplus, biased": Options(top_k=1, score_function="sqrtsoftplus", expert_bias_E=BIAS_E),
}
MATRIX = [
    (name, variant)
    for name, case in CASES.items()
    for variant in VARIANTS
    # the widest rows in two variants, for time
    if case.num_experts <= 256 or variant in ("paper", "sigmoid, biased")
]


def reference_pools(case: Case) -> tuple[Tensor, Tensor]:
    scores_DE = reference.document_scores(
        case.logits(), document_ids_T=case.document_ids(), num_documents=case.num_documents
    )
    pool_DE = reference.select_pool(scores_DE, pool_sizes_D=case.pool_sizes(), num_forced=case.num_forced)
    return scores_DE, pool_DE


@pytest.mark.parametrize("name", CASES)
def test_document_scores_and_pools(compiled: Compiled, name: str, record_property: pytest.RecordProperty) -> None:
    case = CASES[name]
    want_DE, want_pool_DE = reference_pools(case)
    ids_T = case.document_ids()
    got_DE = compiled.ops.document_scores(
        case.logits().to(compiled.device).requires_grad_(),
        document_ids_T=ids_T.to(compiled.device),
        num_documents=case.num_documents,
    )
    assert not got_DE.requires_grad
    tokens_D1 = torch.bincount(ids_T[ids_T >= 0], minlength=case.num_documents)[:, None]
    bound_DE = want_DE * SUM_RTOL + tokens_D1
    assert ((got_DE.cpu() - want_DE).abs() <= bound_DE).all()

    def pools_of(scores_DE: Tensor) -> Tensor:
        sizes_D = case.pool_sizes().to(compiled.device)
        return compiled.ops.select_pool(
            scores_DE.to(compiled.device), pool_sizes_D=sizes_D, num_forced=case.num_forced
        ).cpu()

    # of equal scores the pools are equal, ties included
    assert_equal("pool", pools_of(want_DE), want_pool_DE)
    assert_equal("pool of ties", pools_of(want_DE * 0), reference_of_ties(case))
    differs_D = (pools_of(got_DE) != want_pool_DE).any(dim=1)
    num_free = case.num_experts - case.num_forced
    ranked_DE = want_DE[:, :num_free].sort(dim=1, descending=True).values
    edge_D = (case.pool_sizes() - case.num_forced).clamp(0, num_free)
    padded_DE = torch.cat([ranked_DE, ranked_DE.new_full((case.num_documents, 2), -(2**40))], dim=1)
    inside_D = padded_DE.gather(1, (edge_D - 1).clamp(min=0)[:, None])[:, 0]
    gap_D = inside_D - padded_DE.gather(1, edge_D[:, None])[:, 0]
    is_clear_D = gap_D > 2 * (inside_D * SUM_RTOL + tokens_D1[:, 0])
    assert not (differs_D & is_clear_D).any()
    record_property("pools", case.num_documents)
    record_property("pools on the edge", int((~is_clear_D).sum()))
    record_property("pools that differ", int(differs_D.sum()))


def reference_of_ties(case: Case) -> Tensor:
    nothing_DE = torch.zeros(case.num_documents, case.num_experts, dtype=torch.int64)
    return reference.select_pool(nothing_DE, pool_sizes_D=case.pool_sizes(), num_forced=case.num_forced)


@pytest.mark.parametrize("num_forced", [0, 2])
@pytest.mark.parametrize("num_experts", [4, 70, 1024])
def test_pools_of_any_scores(compiled: Compiled, num_experts: int, num_forced: int) -> None:
    """Negative ones too, and the ends of what an int64 holds."""
    generator = torch.Generator().manual_seed(8)
    low, high = -(2**63), 2**63 - 1
    scores_DE = torch.randint(low, high, (12, num_experts), generator=generator)
    scores_DE[0, :4] = torch.tensor([-5, 3, 2, -1])
    scores_DE[1] = low
    scores_DE[2] = high
    scores_DE[3] = -1
    scores_DE[4, 1:3] = torch.tensor([low, high])
    scores_DE[5] = torch.arange(num_experts) % 3 - 1
    scores_DE[6] = 2**60 - torch.arange(num_experts)
    sizes_D = torch.tensor([2, 3, 3, 3, 3, num_experts // 2, 3, 0, 1, -4, num_experts, 10**6])
    want_DE = reference.select_pool(scores_DE, pool_sizes_D=sizes_D, num_forced=num_forced)
    got_DE = compiled.ops.select_pool(
        scores_DE.to(compiled.device), pool_sizes_D=sizes_D.to(compiled.device), num_forced=num_forced
    )
    assert_equal("pool", got_DE.cpu(), want_DE)


def upstream(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the weights, the score sums and z."""
    generator = torch.Generator().manual_seed(9)
    shapes = (case.logits().shape, case.num_experts, len(case.document_ids()))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def run(
    implementation: NativeOps | object, case: Case, options: Options, pool_DE: Tensor | None, device: torch.device
) -> tuple[Routing, Tensor]:
    """Route a case and send random gradients back."""
    logits_TE = case.logits().to(device).requires_grad_()
    got = implementation.pool_topk(
        logits_TE,
        document_ids_T=case.document_ids().to(device),
        pool_DE=None if pool_DE is None else pool_DE.to(device),
        **options.as_arguments(),
    )
    upstream_TE, upstream_E, upstream_T = (grad.to(device) for grad in upstream(case))
    (grad_TE,) = torch.autograd.grad(
        [got.probs_TE, got.score_sums_E, got.z_T], [logits_TE], [upstream_TE.to(case.dtype), upstream_E, upstream_T]
    )
    return got, grad_TE


def clear_choices(case: Case, options: Options, pool_DE: Tensor, ids_T: Tensor) -> Tensor:
    """[T] bool: tokens whose K-th and next best score are further apart than rounding; computed in float64."""
    logits_TE = case.logits().double()
    is_free_T = (ids_T < 0) & (case.num_documents != 1)
    allowed_TE = pool_DE[ids_T.clamp(min=0)] | is_free_T[:, None]
    keys_TE = logits_TE
    if options.score_function != "softmax":
        keys_TE = logits_TE.sigmoid()
        if options.score_function == "sqrtsoftplus":
            keys_TE = torch.nn.functional.softplus(logits_TE, threshold=700.0).sqrt()
        if options.expert_bias_E is not None:
            keys_TE = keys_TE + options.expert_bias_E
    keys_TE = keys_TE.masked_fill(~allowed_TE, -torch.inf).sort(dim=1, descending=True).values
    beyond_T1 = keys_TE.new_full((len(ids_T), 1), -torch.inf)
    keys_TE = torch.cat([keys_TE, beyond_T1], dim=1)
    inside_T, outside_T = keys_TE[:, case.top_k - 1], keys_TE[:, case.top_k]
    is_tie_T = (inside_T == outside_T) & (options.expert_bias_E is None)
    has_vanished_T = (keys_TE[:, 0] - inside_T > 80) & (options.score_function == "softmax")
    return ((inside_T - outside_T > CHOICE_ATOL) | is_tie_T) & ~has_vanished_T


@pytest.mark.parametrize(("name", "variant"), MATRIX)
def test_routing_and_gradients(
    compiled: Compiled, name: str, variant: str, record_property: pytest.RecordProperty
) -> None:
    case = CASES[name]
    options = replace(VARIANTS[variant], top_k=case.top_k)
    if options.expert_bias_E is not None:
        options = replace(options, expert_bias_E=options.expert_bias_E[: case.num_experts])
    on_device = options
    if options.expert_bias_E is not None:
        on_device = replace(options, expert_bias_E=options.expert_bias_E.to(compiled.device))
    _, pool_DE = reference_pools(case)
    ids_T = case.document_ids()
    want, want_grad_TE = run(reference, case, options, pool_DE, torch.device("cpu"))
    got, grad_TE = run(compiled.ops, case, on_device, pool_DE, compiled.device)

    is_same_T = (got.routing_map_TE.cpu() == want.routing_map_TE).all(dim=1)
    is_clear_T = clear_choices(case, options, pool_DE, ids_T)
    assert (is_same_T | ~is_clear_T).all()
    record_property("choices", len(ids_T))
    record_property("choices on the edge", int((~is_clear_T).sum()))
    record_property("choices that differ", int((~is_same_T).sum()))
    assert got.routing_map_TE.sum(dim=1).eq(case.top_k).all()
    is_real_T1 = (ids_T >= 0)[:, None]
    assert_equal("tokens", got.tokens_per_expert_E.cpu(), (got.routing_map_TE.cpu() & is_real_T1).sum(dim=0))

    rtol = RTOL[case.dtype]
    at = is_same_T
    assert_close("probs", got.probs_TE.cpu()[at].float(), want.probs_TE[at].float(), rtol=rtol)
    assert_close("gradient", grad_TE.cpu()[at].float(), want_grad_TE[at].float(), rtol=case.grad_rtol or rtol)
    assert_close("z", got.z_T.cpu(), want.z_T, rtol=1e-6)
    num_tokens = int(is_real_T1.sum())
    assert (got.num_tokens, got.num_nonfinite) == (num_tokens, 0)
    bound = num_tokens * 2e-6 * math.log(case.num_experts + 1) * 2**SCORE_FRACTION_BITS
    assert abs(got.entropy_sum.item() - want.entropy_sum.item()) <= bound
    # a column is a sum of units of 2**-27, each rounded to the nearest
    unit = len(ids_T) * 2.0 ** -(SCORE_FRACTION_BITS + 1)
    difference_E = (got.score_sums_E.cpu() - want.score_sums_E).abs()
    assert (difference_E <= want.score_sums_E * 1e-6 + unit).all()
    assert not got.counts_X.requires_grad
    assert not grad_TE.cpu()[~is_real_T1[:, 0]].any()
    assert not got.probs_TE.cpu()[~got.routing_map_TE.cpu()].any()


@pytest.mark.parametrize("variant", ["paper", "renormalised", "sigmoid", "sqrtsoftplus, biased"])
def test_gradients_of_far_apart_logits(compiled: Compiled, variant: str) -> None:
    """Here the reference loses digits, so a float64 loop over the tokens is the judge."""
    case = CASES["far apart"]
    options = replace(VARIANTS[variant], top_k=case.top_k, expert_bias_E=None)
    _, pool_DE = reference_pools(case)
    ids_T = case.document_ids()
    _, grad_TE = run(compiled.ops, case, options, pool_DE, compiled.device)
    exact_TE = case.logits().double().requires_grad_()
    upstream_TE, upstream_E, upstream_T = upstream(case)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(len(ids_T)):
        if ids_T[token] >= 0:
            pool = pool_DE[ids_T[token]].nonzero()[:, 0].tolist()
            want = naive_token(exact_TE[token], pool, options)
            total = total + (want["probs"] * upstream_TE[token]).sum()
            total = total + want["scores"] @ upstream_E.double() + want["z"] * upstream_T[token]
    total.backward()
    assert_close("gradient", grad_TE.cpu(), exact_TE.grad.float(), rtol=1e-6)


@pytest.mark.parametrize("num_pools", [None, 0, 1])
def test_pools_that_are_not_one_a_document(compiled: Compiled, num_pools: int | None) -> None:
    case = Case(lengths=(20, 9), num_experts=50, top_k=4)
    pool_DE = None
    if num_pools is not None:
        pool_DE = torch.arange(50).expand(num_pools, 50) % 3 == 0
    options = Options(top_k=4)
    want, want_grad_TE = run(reference, case, options, pool_DE, torch.device("cpu"))
    got, grad_TE = run(compiled.ops, case, options, pool_DE, compiled.device)
    assert_equal("routing_map", got.routing_map_TE.cpu(), want.routing_map_TE)
    assert_close("probs", got.probs_TE.cpu(), want.probs_TE, rtol=1e-6)
    assert_close("gradient", grad_TE.cpu(), want_grad_TE, rtol=1e-6)


def test_ids_past_the_last_document_reach_nothing(compiled: Compiled) -> None:
    """The host refuses them; a GPU cannot look without waiting, so there they are padding."""
    logits_TE = random_logits(40, 20).to(compiled.device)
    ids_T = torch.arange(40, device=compiled.device) // 10
    pool_DE = torch.ones(3, 20, dtype=torch.bool, device=compiled.device)
    if compiled.is_checked:
        message = "document_ids must be below the number of documents, 3; got 3"
        with pytest.raises(RuntimeError, match=message):
            compiled.ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=3)
        with pytest.raises(RuntimeError, match=message):
            compiled.ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=2)
        return
    got = compiled.ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=2)
    assert got.tokens_per_expert_E.sum() == 60
    assert not got.probs_TE[30:].any()
    scores_DE = compiled.ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=3)
    want_DE = compiled.ops.document_scores(logits_TE[:30], document_ids_T=ids_T[:30], num_documents=3)
    assert_equal("scores", scores_DE, want_DE)


def test_without_documents_no_token_is_padding(compiled: Compiled) -> None:
    logits_TE = random_logits(9, 20)
    want = reference.pool_topk(logits_TE, top_k=3)
    got = compiled.ops.pool_topk(logits_TE.to(compiled.device), top_k=3)
    assert_equal("routing_map", got.routing_map_TE.cpu(), want.routing_map_TE)
    assert_close("probs", got.probs_TE.cpu(), want.probs_TE, rtol=1e-6)
    assert_equal("tokens", got.tokens_per_expert_E.cpu(), want.tokens_per_expert_E)


@pytest.mark.parametrize("given", ["probs", "score_sums", "z"])
def test_gradients_of_some_outputs_alone(compiled: Compiled, given: str) -> None:
    case = Case(lengths=(12, 7), num_experts=40, top_k=3)
    _, pool_DE = reference_pools(case)
    grads = []
    for implementation, device in ((reference, torch.device("cpu")), (compiled.ops, compiled.device)):
        logits_TE = case.logits().to(device).requires_grad_()
        got = implementation.pool_topk(
            logits_TE, document_ids_T=case.document_ids().to(device), pool_DE=pool_DE.to(device), top_k=3
        )
        loss = {
            "probs": (got.probs_TE * torch.arange(40.0, device=device)).sum(),
            "score_sums": got.score_sums_E.square().sum(),
            "z": got.z_T.square().sum(),
        }[given]
        loss.backward()
        grads.append(logits_TE.grad.cpu())
    assert_close("gradient", grads[1], grads[0], rtol=1e-6)


def test_gradients_at_experts_not_chosen_do_not_matter(compiled: Compiled) -> None:
    case = Case(num_experts=40, top_k=3)
    _, pool_DE = reference_pools(case)
    grads = []
    for poison in (0.0, torch.nan):
        logits_TE = case.logits().to(compiled.device).requires_grad_()
        got = compiled.ops.pool_topk(
            logits_TE,
            document_ids_T=case.document_ids().to(compiled.device),
            pool_DE=pool_DE.to(compiled.device),
            top_k=3,
        )
        upstream_TE = torch.ones_like(logits_TE).masked_fill(~got.routing_map_TE, poison)
        grads += torch.autograd.grad([got.probs_TE], [logits_TE], [upstream_TE])
    assert_equal("gradient", grads[1], grads[0])


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("num_experts", [40, 200])
def test_ties_go_to_the_lower_index(compiled: Compiled, num_experts: int, score_function: str) -> None:
    # three levels, each shared by a third of the experts; zero comes with both signs
    level_E = torch.tensor([0.0, 1.0, -0.0])[torch.arange(num_experts) % 3]
    logits_TE = level_E.expand(20, num_experts).contiguous()
    for top_k in (1, 5, num_experts // 3 + 2, 31):
        if top_k > num_experts or top_k > native.MAX_TOP_K:
            continue
        pool_DE = torch.rand(1, num_experts, generator=torch.Generator().manual_seed(top_k)) < 0.8
        options = {"top_k": top_k, "score_function": score_function}
        want = reference.pool_topk(logits_TE, pool_DE=pool_DE, **options)
        got = compiled.ops.pool_topk(logits_TE.to(compiled.device), pool_DE=pool_DE.to(compiled.device), **options)
        assert_equal("routing_map", got.routing_map_TE.cpu(), want.routing_map_TE)


def test_a_pool_smaller_than_top_k_still_gives_k_experts(compiled: Compiled) -> None:
    pool_DE = torch.zeros(1, 70, dtype=torch.bool)
    pool_DE[0, [3, 69]] = True
    logits_TE = random_logits(5, 70).to(compiled.device)
    got = compiled.ops.pool_topk(logits_TE, pool_DE=pool_DE.to(compiled.device), top_k=4)
    assert got.routing_map_TE[0].nonzero()[:, 0].tolist() == [0, 1, 3, 69]
    assert got.probs_TE[:, :2].eq(0).all()


def everything(compiled: Compiled, case: Case) -> list[Tensor]:
    """All the ops give for a case, as one list."""
    device, ids_T = compiled.device, case.document_ids().to(compiled.device)
    scores_DE = compiled.ops.document_scores(
        case.logits().to(device), document_ids_T=ids_T, num_documents=case.num_documents
    )
    pool_DE = compiled.ops.select_pool(scores_DE, pool_sizes_D=case.pool_sizes().to(device))
    got, grad_TE = run(compiled.ops, case, Options(top_k=case.top_k), pool_DE, device)
    values = [getattr(got, field.name) for field in fields(Routing)]
    # the same with gates, and with sums of each document
    logits_TE = case.logits().to(device).requires_grad_()
    documents = {"document_ids_T": ids_T, "num_documents": case.num_documents}
    gates = {"score_function": "sqrtsoftplus"}
    sums_DE = compiled.ops.document_scores(logits_TE, **documents, **gates)
    apart = compiled.ops.pool_topk(logits_TE, **documents, pool_DE=pool_DE, top_k=case.top_k, **gates)
    (apart_TE,) = torch.autograd.grad(apart.score_sums_RE.square().sum(), logits_TE)
    values += [sums_DE, apart.score_sums_RE, apart.document_choices_DE, apart_TE]
    return [scores_DE, pool_DE, grad_TE, *values]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_the_same_bits_for_any_number_of_threads(num_threads: int) -> None:
    compiled = Compiled(host_ops(), torch.device("cpu"))
    case = Case(lengths=(700, 1, 900, 1, 1, 333), num_experts=70, top_k=5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(compiled, case)
        torch.set_num_threads(num_threads)
        for got, wanted in zip(everything(compiled, case), want, strict=True):
            assert_equal("threads", got, wanted)
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_for_any_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(load_compiled("cuda"), torch.device("cpu"))
    case = Case(lengths=(60, 1, 90, 1, 1, 33), num_experts=70, top_k=5)
    want = everything(compiled, case)
    for seed in range(1, 6):
        monkeypatch.setenv("EMO_EMULATOR_SEED", str(seed))
        for got, wanted in zip(everything(compiled, case), want, strict=True):
            assert_equal("schedule", got, wanted)


def test_the_same_bits_for_any_split_of_the_tokens(compiled: Compiled) -> None:
    case = Case(lengths=(30, 1, 45), num_experts=70, top_k=5)
    device = compiled.device
    logits_TE, ids_T = case.logits().to(device), case.document_ids().to(device)
    scores_DE, pool_DE, _, *_ = everything(compiled, case)
    whole = compiled.ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=5)
    order = torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(1)).to(device)
    parts_DE, counts_X = [], []
    for rows in order.tensor_split([5, 6, 40]):
        parts_DE.append(compiled.ops.document_scores(logits_TE[rows], document_ids_T=ids_T[rows], num_documents=3))
        part = compiled.ops.pool_topk(logits_TE[rows], document_ids_T=ids_T[rows], pool_DE=pool_DE, top_k=5)
        counts_X.append(part.counts_X)
        for name in ("probs_TE", "routing_map_TE", "z_T"):
            assert_equal(name, getattr(part, name), getattr(whole, name)[rows])
    assert_equal("scores", sum(parts_DE), scores_DE)
    assert_equal("counts", sum(counts_X), whole.counts_X)


def test_no_tokens_no_documents(compiled: Compiled) -> None:
    device = compiled.device
    nothing, ids_T = (torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device))
    scores_DE = compiled.ops.document_scores(nothing, document_ids_T=ids_T, num_documents=2)
    assert scores_DE.tolist() == [[0] * 5] * 2
    no_sizes = torch.empty(0, dtype=torch.int64, device=device)
    assert compiled.ops.select_pool(scores_DE[:0], pool_sizes_D=no_sizes).shape == (0, 5)
    leaf = nothing.requires_grad_()
    got = compiled.ops.pool_topk(leaf, document_ids_T=ids_T, top_k=2)
    assert got.tokens_per_expert_E.tolist() == got.score_sums_E.tolist() == [0] * 5
    got.score_sums_E.sum().backward()
    assert leaf.grad.shape == (0, 5)


def test_operators_keep_the_rules_of_torch(compiled: Compiled) -> None:
    operators = getattr(torch.ops, compiled.ops.namespace)
    case = Case(lengths=(6, 3), num_experts=10, top_k=2)
    device = compiled.device
    logits_TE, ids_T = case.logits().to(device), case.document_ids().to(device)
    scores_DE, pool_DE = (tensor.to(device) for tensor in reference_pools(case))
    torch.use_deterministic_algorithms(False)
    options, sums = (2, native.SQRTSOFTPLUS, True, 1.0), (2, True)
    whole = (*options, 5, 1, *sums)
    routing_map_TE = operators.pool_topk(logits_TE, ids_T, pool_DE, None, *whole)[1]
    grad_TE, grad_E, grad_T = (grad.to(device) for grad in upstream(case))
    grads = (grad_TE, torch.stack([grad_E, -grad_E]), grad_T)
    for operator, arguments in (
        (operators.document_scores, (logits_TE, ids_T, 2, native.SOFTMAX)),
        (operators.document_scores, (logits_TE, ids_T, 2, native.SQRTSOFTPLUS)),
        (operators.select_pool, (scores_DE, case.pool_sizes().to(device), 0)),
        (operators.pool_topk, (logits_TE.requires_grad_(), ids_T, pool_DE, None, *whole)),
        (operators.pool_topk, (logits_TE, ids_T, pool_DE, None, 2, 0, True, 1.0, 0, 0, 0, False)),
        (operators.pool_topk_backward, (*grads, logits_TE.detach(), routing_map_TE, ids_T, pool_DE, *options, *sums)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_torch_compile_sees_through() -> None:
    case = Case(lengths=(6, 3), num_experts=10, top_k=2)

    def step(logits_TE: Tensor, ids_T: Tensor, sizes_D: Tensor) -> Tensor:
        scores_DE = ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=2)
        pool_DE = ops.select_pool(scores_DE, pool_sizes_D=sizes_D)
        routed = {"document_ids_T": ids_T, "pool_DE": pool_DE, "top_k": 2}
        got = ops.pool_topk(logits_TE * 2, **routed)
        apart = ops.pool_topk(logits_TE, **routed, score_function="sqrtsoftplus", num_documents=2)
        sums_DE = apart.score_sums_RE * apart.document_choices_DE
        return got.probs_TE.square().sum() + got.z_T.sum() + sums_DE.square().sum()

    torch.use_deterministic_algorithms(False)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits_TE = case.logits().requires_grad_()
        function(logits_TE, case.document_ids(), case.pool_sizes()).backward()
        grads.append(logits_TE.grad)
    assert_equal("gradient", grads[1], grads[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 33}, "top_k must lie in"),
        ({"top_k": 9}, "be at most E = 8"),
        ({"pool_DE": torch.ones(2, 8, dtype=torch.bool)}, "several pools need document_ids"),
        ({"pool_DE": torch.ones(1, 7, dtype=torch.bool)}, "pool must have shape"),
        ({"document_ids_T": torch.zeros(3, dtype=torch.int64)}, "document_ids must have shape"),
        ({"document_ids_T": torch.zeros(4, dtype=torch.int32)}, "document_ids has the wrong dtype"),
        ({"num_documents": 2}, "sums by document need document_ids"),
        (
            {"num_documents": -1, "document_ids_T": torch.zeros(4, dtype=torch.int64)},
            "num_documents must not be negative",
        ),
        (
            {"num_documents": 1, "document_ids_T": torch.tensor([0, 1, -1, 0])},
            "document_ids must be below the number of documents, 1; got 1",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.load_native().pool_topk(random_logits(4, 8), **{"top_k": 2, **arguments})
    with pytest.raises(RuntimeError, match="logits must be float32"):
        native.load_native().pool_topk(random_logits(4, 8).double(), top_k=2)
