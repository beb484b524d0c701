"""Groups of experts: a token's, inside its pool, and a document's, against plain loops, Megatron and each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.emulator import Compiled, load_compiled
from support.routing import assert_close, assert_equal, random_logits
from torch import Tensor

from emo_megatron.ops import limit_to_groups, native, reference
from emo_megatron.ops.groups import groups_used
from emo_megatron.ops.reference import Routing

GAP = 1e-6
"""What decides may be rounded where it is closer than this, of what it is."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """How a token is limited."""

    num_experts: int
    num_groups: int
    group_topk: int
    top_k: int

    @property
    def size(self) -> int:
        return self.num_experts // self.num_groups

    def as_arguments(self) -> dict[str, int]:
        names = ("num_groups", "group_topk", "top_k")
        return {name: getattr(self, name) for name in names}


SHAPES = {
    f"{E} experts in {G} groups, {Kg} of them, top-{K}": Groups(num_experts=E, num_groups=G, group_topk=Kg, top_k=K)
    for E, G, Kg, K in [
        (256, 8, 4, 8),
        (128, 8, 4, 8),
        (32, 8, 4, 8),
        (16, 4, 2, 4),
        (12, 4, 2, 2),
        (64, 8, 4, 8),
        (64, 32, 7, 14),
        (24, 3, 2, 4),
        (40, 5, 3, 6),
        (120, 20, 3, 8),
        (48, 2, 1, 5),
        (160, 8, 3, 6),
        (33, 11, 3, 7),
        (32, 32, 4, 4),
    ]
}
WIDE = {
    "wide rows in 5 groups": Groups(num_experts=1000, num_groups=5, group_topk=2, top_k=9),
    "512 experts in 16 groups": Groups(num_experts=512, num_groups=16, group_topk=4, top_k=8),
    "1024 experts in 2 groups": Groups(num_experts=1024, num_groups=2, group_topk=1, top_k=32),
}
BIAS_E = torch.linspace(-0.5, 0.5, 1024)[torch.arange(1024) * 37 % 1024]
COMPILED = {
    "paper": {},
    "renormalised": {"pre_softmax": False, "scaling_factor": 2.5},
    "selection": {"mask": "selection"},
    "sigmoid, biased": {"score_function": "sigmoid", "expert_bias_E": BIAS_E},
}
VARIANTS = COMPILED | {"sqrtsoftplus, biased": {"score_function": "sqrtsoftplus", "expert_bias_E": BIAS_E}}


def options_of(variant: str, groups: Groups, device: str | torch.device = "cpu") -> dict[str, Any]:
    options = groups.as_arguments() | VARIANTS[variant]
    if "expert_bias_E" in options:
        options["expert_bias_E"] = BIAS_E[: groups.num_experts].to(device)
    return options


def choose(keys: Sequence[float], pool: Sequence[bool], groups: Groups) -> tuple[list[int], float]:
    """The definition as loops: a token's experts, and how close, of what they are, two deciding numbers lie."""
    wanted = groups.top_k // groups.group_topk
    ranked = []
    for group in range(groups.num_groups):
        members = range(group * groups.size, (group + 1) * groups.size)
        held = sorted((keys[e] for e in members if pool[e]), reverse=True)
        counted = min(wanted, len(held))
        ranked.append((-counted, -sum(held[:counted]), group, len(held)))
    ranked.sort()
    admitted, num_held = set(), 0
    for rank, (_, _, group, held_here) in enumerate(ranked):
        if rank >= groups.group_topk and num_held >= groups.top_k:
            break
        admitted.add(group)
        num_held += held_here
    candidates = [e for e, is_in in enumerate(pool) if is_in and e // groups.size in admitted]
    candidates.sort(key=lambda e: (-keys[e], e))
    gaps = [
        abs(low - high) / max(abs(low), abs(high), 1e-30)
        for (n, low, *_), (other_n, high, *_) in pairwise(ranked)
        if n == other_n < 0
    ]
    gaps += [
        (keys[inside] - keys[outside]) / max(abs(keys[inside]), 1e-30)
        for inside, outside in zip(
            candidates[groups.top_k - 1 : groups.top_k], candidates[groups.top_k :], strict=False
        )
    ]
    # a pool that holds fewer than K is filled up with the lowest experts outside of it
    rest = [e for e, is_in in enumerate(pool) if not is_in]
    return sorted((candidates[: groups.top_k] + rest)[: groups.top_k]), min(gaps, default=1.0)


def keys_of(logits_TE: Tensor, options: dict[str, Any]) -> Tensor:
    """[T, E] float64, what ranks experts, probabilities up to a factor of the token."""
    exact_TE = logits_TE.double()
    if options.get("score_function", "softmax") == "softmax":
        top_T1 = exact_TE.amax(dim=1, keepdim=True)
        return (exact_TE - top_T1).exp() if options.get("pre_softmax", True) else exact_TE
    is_sigmoid = options["score_function"] == "sigmoid"
    gates_TE = exact_TE.sigmoid() if is_sigmoid else torch.log1p(exact_TE.exp()).sqrt()
    return gates_TE + options["expert_bias_E"].double().cpu()


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens of documents, one of them empty, others of one token, and padding; pools of K to E experts."""

    logits_TE: Tensor
    ids_T: Tensor
    pool_DE: Tensor

    @property
    def is_valid_T(self) -> Tensor:
        return self.ids_T >= 0

    def pool_of(self, token: int) -> list[bool]:
        document = int(self.ids_T[token])
        return [True] * self.pool_DE.shape[1] if document < 0 else self.pool_DE[document].tolist()


def case_of(groups: Groups, *, smallest: int | None = None) -> Case:
    lengths = (9, 1, 0, 12, 1, 1, 6, 8)
    ids_T = torch.tensor([d for d, length in enumerate(lengths) for _ in range(length)] + [-1] * 3)
    ids_T = ids_T[torch.randperm(len(ids_T), generator=torch.Generator().manual_seed(2))]
    generator = torch.Generator().manual_seed(groups.num_experts + groups.num_groups)
    num_experts, low = groups.num_experts, groups.top_k if smallest is None else smallest
    sizes_D = torch.randint(low, num_experts + 1, (len(lengths),), generator=generator)
    # thin ones too, and one that holds everything
    sizes_D[:4] = torch.tensor([low, low + 1, low, min(low + 3, num_experts)])
    sizes_D[-1] = num_experts
    order_DE = torch.rand(len(lengths), num_experts, generator=generator).argsort().argsort()
    return Case(
        logits_TE=random_logits(len(ids_T), num_experts, seed=3), ids_T=ids_T, pool_DE=order_DE < sizes_D[:, None]
    )


def route(ops: Any, case: Case, options: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Routing, Tensor]:
    """Route, and send gradients back."""
    logits_TE = case.logits_TE.to(device).requires_grad_()
    routed = ops.pool_topk(logits_TE, document_ids_T=case.ids_T.to(device), pool_DE=case.pool_DE.to(device), **options)
    weights_TE = random_logits(*logits_TE.shape, seed=9).to(device)
    loss = (routed.probs_TE * weights_TE).sum() + routed.z_T.square().sum()
    (loss + routed.score_sums_E @ weights_TE[0]).backward()
    return routed, logits_TE.grad.cpu()


def over_groups(map_TE: Tensor, is_valid_T: Tensor, groups: Groups) -> int:
    """How many valid tokens use more groups than they should, counted from the map."""
    chosen = [row.nonzero()[:, 0].tolist() for row in map_TE.cpu()[is_valid_T]]
    used = [len({expert // groups.size for expert in experts}) for experts in chosen]
    return sum(count > groups.group_topk for count in used)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_is_a_plain_loop(shape: str, variant: str) -> None:
    groups = SHAPES[shape]
    for smallest in (None, max(groups.top_k - 2, 1)):
        case = case_of(groups, smallest=smallest)
        options = options_of(variant, groups)
        routed = reference.pool_topk(case.logits_TE, document_ids_T=case.ids_T, pool_DE=case.pool_DE, **options)
        keys_TE, num_clear = keys_of(case.logits_TE, options), 0
        for token, keys_E in enumerate(keys_TE.tolist()):
            want, gap = choose(keys_E, case.pool_of(token), groups)
            got = routed.routing_map_TE[token].nonzero()[:, 0].tolist()
            num_clear += gap > GAP
            assert got == want or gap <= GAP
        assert num_clear >= 0.9 * len(keys_TE)
        found = over_groups(routed.routing_map_TE, case.is_valid_T, groups)
        assert routed.num_over_groups == found


@pytest.mark.parametrize(
    "options",
    [
        {"use_pre_softmax": True},
        {"use_pre_softmax": True, "scaling_factor": 16.0},
        {},
        {"score_function": "sigmoid"},
        {"score_function": "sigmoid", "expert_bias": BIAS_E, "scaling_factor": 2.5},
        {"score_function": "sqrtsoftplus", "expert_bias": BIAS_E, "scaling_factor": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_pools_of_all_experts_are_megatron_bit_for_bit(shape: str, options: dict[str, Any]) -> None:
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    groups = SHAPES[shape]
    limits = {"num_groups": groups.num_groups, "group_topk": groups.group_topk}
    bias_E = BIAS_E[: groups.num_experts] if "expert_bias" in options else None
    logits_TE = random_logits(200, groups.num_experts, seed=5)
    want_TE, want_map_TE = moe_utils.topk_routing_with_score_function(
        logits_TE, topk=groups.top_k, **{**options, **limits, "expert_bias": bias_E}
    )
    for pool_DE in (None, torch.ones(1, groups.num_experts, dtype=torch.bool)):
        routed = reference.pool_topk(
            logits_TE,
            pool_DE=pool_DE,
            pre_softmax=options.get("use_pre_softmax", False),
            score_function=options.get("score_function", "softmax"),
            scaling_factor=options.get("scaling_factor"),
            expert_bias_E=bias_E,
            **groups.as_arguments(),
        )
        assert_equal("map", routed.routing_map_TE, want_map_TE)
        assert_equal("probs", routed.probs_TE, want_TE)
        assert routed.num_over_groups == 0


@pytest.mark.parametrize("variant", COMPILED)
@pytest.mark.parametrize("shape", SHAPES | WIDE)
def test_the_compiled_ops_route_as_the_reference(
    compiled: Compiled, shape: str, variant: str, record_property: pytest.RecordProperty
) -> None:
    groups = (SHAPES | WIDE)[shape]
    for smallest in (None, max(groups.top_k - 2, 1)):
        case = case_of(groups, smallest=smallest)
        options = options_of(variant, groups)
        want, want_grad_TE = route(reference, case, options)
        on_device = options_of(variant, groups, compiled.device)
        got, grad_TE = route(compiled.ops, case, on_device, compiled.device)

        keys_TE = keys_of(case.logits_TE, options).tolist()
        gaps = [choose(keys, case.pool_of(t), groups)[1] for t, keys in enumerate(keys_TE)]
        is_clear_T = torch.tensor(gaps) > GAP
        is_same_T = (got.routing_map_TE.cpu() == want.routing_map_TE).all(dim=1)
        assert (is_same_T | ~is_clear_T).all()
        record_property("choices", len(is_clear_T))
        record_property("choices on the edge", int((~is_clear_T).sum()))
        record_property("choices that differ", int((~is_same_T).sum()))
        at = is_same_T
        assert_close("probs", got.probs_TE.detach().cpu()[at], want.probs_TE.detach()[at], rtol=1e-6)
        assert_close("gradient", grad_TE[at], want_grad_TE[at], rtol=1e-6)
        assert_close("z", got.z_T.detach().cpu(), want.z_T.detach(), rtol=1e-6)
        counted_TE = got.routing_map_TE.cpu() & case.is_valid_T[:, None]
        assert_equal("tokens", got.tokens_per_expert_E.cpu(), counted_TE.sum(dim=0))
        assert (got.num_tokens, got.num_nonfinite) == (case.is_valid_T.sum(), 0)
        assert got.num_over_groups == over_groups(got.routing_map_TE, case.is_valid_T, groups)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"pre_softmax": False}, {"score_function": "sigmoid"}])
def test_ties_go_to_the_lower_group_and_expert(compiled: Compiled, shape: str, options: dict[str, Any]) -> None:
    groups = SHAPES[shape]
    generator = torch.Generator().manual_seed(7)
    levels = torch.tensor([0.0, 1.0, -0.0])
    logits_TE = levels[torch.randint(0, 3, (30, groups.num_experts), generator=generator)]
    logits_TE[0], logits_TE[1] = 0.0, -torch.inf
    logits_TE[1, groups.num_experts // 2] = 1.0
    pool_DE = torch.rand(1, groups.num_experts, generator=generator) < 0.6
    options = groups.as_arguments() | options
    for pool in (None, pool_DE):
        want = reference.pool_topk(logits_TE, pool_DE=pool, **options)
        on_device = None if pool is None else pool.to(compiled.device)
        got = compiled.ops.pool_topk(logits_TE.to(compiled.device), pool_DE=on_device, **options)
        if pool is None:
            first = torch.arange(groups.num_experts)[: groups.group_topk * groups.size]
            assert want.routing_map_TE[0].nonzero()[:, 0].equal(first[: groups.top_k])
        assert_equal("map", got.routing_map_TE.cpu(), want.routing_map_TE)
        assert_equal("counts", got.counts_X[:-1].cpu(), want.counts_X[:-1])


def test_padding_in_a_thin_pool_does_not_count(compiled: Compiled) -> None:
    pool_DE = (torch.arange(24) % 3 == 1)[None]  # an expert a group, so a token needs four groups
    ids_T = torch.tensor([0, -1, 0, 0, -1, -1, 0])
    arguments = {"top_k": 4, "num_groups": 8, "group_topk": 2}
    logits_TE = random_logits(len(ids_T), 24)
    for ops, device in ((reference, torch.device("cpu")), (compiled.ops, compiled.device)):
        routed = ops.pool_topk(
            logits_TE.to(device), document_ids_T=ids_T.to(device), pool_DE=pool_DE.to(device), **arguments
        )
        assert routed.num_over_groups == 4
        assert not routed.routing_map_TE.cpu()[:, ~pool_DE[0]].any()


def test_as_many_groups_as_there_are_limit_nothing(compiled: Compiled) -> None:
    groups = Groups(num_experts=24, num_groups=3, group_topk=3, top_k=4)
    case = case_of(groups)
    want, want_grad_TE = route(compiled.ops, case, {"top_k": 4}, compiled.device)
    got, grad_TE = route(compiled.ops, case, groups.as_arguments(), compiled.device)
    for field in fields(Routing):
        assert_equal(field.name, getattr(got, field.name), getattr(want, field.name))
    assert_equal("gradient", grad_TE, want_grad_TE)


@pytest.mark.parametrize("shape", list(SHAPES)[1:4] + list(WIDE)[:1])
def test_the_same_bits_for_any_schedule(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, groups = load_compiled("cuda"), (SHAPES | WIDE)[shape]
    case, options = case_of(groups), groups.as_arguments()
    want, _ = route(emulated, case, options)
    for seed in range(1, 4):
        monkeypatch.setenv("EMO_EMULATOR_SEED", str(seed))
        got, _ = route(emulated, case, options)
        for field in fields(Routing):
            assert_equal(field.name, getattr(got, field.name), getattr(want, field.name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 5, "group_topk": 2}, "num_groups must divide E = 24"),
        ({"num_groups": 33, "group_topk": 2}, "num_groups must lie in"),
        ({"num_groups": 12, "group_topk": 1}, "group_topk groups must hold top_k experts"),
        ({"num_groups": 4, "group_topk": 5}, "group_topk groups must hold top_k experts"),
        ({"num_groups": 4, "group_topk": 0}, "group_topk groups must hold top_k experts"),
    ],
)
def test_bad_groups_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native.load_native().pool_topk(random_logits(4, 24), top_k=4, **arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_documents_pool_lies_inside_its_groups(shape: str) -> None:
    groups, wanted = SHAPES[shape], SHAPES[shape].top_k // SHAPES[shape].group_topk
    draw = random.Random(4)
    # few levels, so that groups tie
    scores = [[draw.randint(-3, 3) for _ in range(groups.num_experts)] for _ in range(40)]
    sizes = [draw.randint(groups.top_k, groups.num_experts + 2) for _ in scores]
    got_DE, got_D = limit_to_groups(torch.tensor(scores), torch.tensor(sizes), **groups.as_arguments())
    lowest, most = torch.iinfo(torch.int64).min, groups.group_topk * groups.size
    for row, size, got, got_size in zip(scores, sizes, got_DE.tolist(), got_D.tolist(), strict=True):
        if size >= groups.num_experts:
            assert (got, got_size) == (row, size)
            continue
        starts = range(0, groups.num_experts, groups.size)
        sums = [sum(sorted(row[s : s + groups.size])[::-1][:wanted]) for s in starts]
        kept = sorted(range(groups.num_groups), key=lambda g: (-sums[g], g))[: groups.group_topk]
        want = [score if e // groups.size in kept else lowest for e, score in enumerate(row)]
        assert (got, got_size) == (want, min(size, most))
    pool_DE = reference.select_pool(got_DE, pool_sizes_D=got_D)
    is_all_D = torch.tensor(sizes) >= groups.num_experts
    used_D = groups_used(pool_DE, groups.num_groups)
    assert (used_D[~is_all_D] <= groups.group_topk).all()
    assert pool_DE.sum(dim=1).equal(got_D.clamp(max=groups.num_experts))
