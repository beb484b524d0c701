"""The balance losses of PoolRouter: written out document by document, and against Megatron's own."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support import tiny

from emo_megatron.config import PoolConfig

BOUNDS = [0, 5, 16, 17, 17, 28]
"""A document of one token, an empty one, and four tokens of padding behind the last."""
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def _router(pool, kinds, **options):
    get_moe_metrics_tracker().clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(())
    balance = {"moe_router_load_balancing_type": list(kinds), "moe_aux_loss_coeff": list(kinds.values())}
    return tiny.router(pool, **balance | {"moe_z_loss_coeff": None} | options).train()


def _set_bias(router):
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.4, 0.4, 8))


def _route(router, logits):
    """The gradient of the attached losses alone, what was chosen, and what was logged."""
    probs, routing_map = router.routing(logits)
    (gradient,) = torch.autograd.grad(probs.sum() * 0.0, [logits])
    logged = {name: entry.values[0].item() for name, entry in get_moe_metrics_tracker().metrics.items()}
    return gradient, routing_map, logged


def _normalised(logits, score_function):
    if score_function == "softmax":
        return logits.softmax(-1)
    gates = logits.sigmoid()
    if score_function == "sqrtsoftplus":
        gates = torch.nn.functional.softplus(logits).sqrt()
    gates = gates * (logits > float("-inf"))
    return gates / gates.sum(-1, keepdim=True)


def _against_the_definition(pool, kinds, score_function, per_token, **options):
    tiny.setup()
    options |= {"moe_router_score_function": score_function, "calculate_per_token_loss": per_token}
    router = _router(pool, kinds, **options)
    _set_bias(router)
    router.scope = tiny.scope(tiny.packed(BOUNDS, tokens_per_sample=32), pool)
    logits = torch.randn(32, 1, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    gradient, routing_map, logged = _route(router, logits)
    pools = router.scope.pools.get(1)
    parts, scores_of, chosen_of, z_of, differing = [], [], [], [], 0
    for document, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        if start == end:
            continue
        inside = torch.ones(8, dtype=torch.bool) if pools is None else pools[document]
        rows = logits[start:end, 0].masked_fill(~inside, float("-inf"))
        scores = _normalised(rows, score_function)
        chosen = routing_map[start:end].double()
        if router.expert_bias is not None:
            best = scores.topk(router.topk, dim=-1).indices
            counted = torch.zeros_like(chosen).scatter_(-1, best, 1.0)
            differing += int((counted != chosen).any(-1).sum())
            chosen = counted
        fraction = chosen.sum(0) / chosen.sum()
        parts.append((end - start) * inside.sum() * (fraction * scores.mean(0)).sum())
        z_of.append(rows.logsumexp(-1).square())
        scores_of.append(scores)
        chosen_of.append(chosen)
    assert (differing > 10) == (router.expert_bias is not None)
    scores, chosen = torch.cat(scores_of), torch.cat(chosen_of)
    whole = 8 * (chosen.sum(0) / chosen.sum() * scores.mean(0)).sum()
    values = {"aux_loss": whole, "global_aux_loss": whole, "seq_aux_loss": sum(parts) / BOUNDS[-1]}
    z, z_weight = torch.cat(z_of).mean(), options.get("moe_z_loss_coeff") or 0.0
    loss = sum(weight * values[kind] for kind, weight in kinds.items()) + z_weight * z
    (want,) = torch.autograd.grad(loss * (BOUNDS[-1] if per_token else 1), [logits])
    sizes = [] if pools is None else pools.sum(-1).tolist()
    wanted = {NAMES[kind]: values[kind].item() for kind, weight in kinds.items() if weight}
    return gradient, want, logged, wanted | ({"z_loss": z.item()} if z_weight else {}), sizes


def _require_definition(answer):
    gradient, want, logged, values, sizes = answer
    torch.testing.assert_close(gradient.double(), want.double(), rtol=2e-5, atol=1e-7)
    assert logged == pytest.approx(values, rel=1e-5)
    return sizes


SEQ_AUX = {"seq_aux_loss": 0.2}
ALL_KINDS = {"seq_aux_loss": 0.2, "aux_loss": 0.3, "global_aux_loss": 0.05}
Z = {"moe_z_loss_coeff": 0.001}


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    ("kinds", "per_token", "options"),
    [
        ({"aux_loss": 0.3}, False, {}),
        (SEQ_AUX, False, {}),
        (SEQ_AUX, True, {}),
        (ALL_KINDS, True, {}),
        ({"global_aux_loss": 0.05}, False, Z),
        ({"global_aux_loss": 0.05}, True, Z),
        ({"global_aux_loss": 0.0}, False, Z),
        ({"global_aux_loss": 0.0}, True, Z),
    ],
)
def test_losses_are_their_definition(ranks, kinds, per_token, options, score_function):
    options = options | {"score_function": score_function, "per_token": per_token}
    pool = PoolConfig(pool_min=3, pool_unrestricted=0.4)
    (answer,) = ranks(1).run(_against_the_definition, pool=pool, kinds=kinds, **options)
    assert {8} < set(_require_definition(answer))


def test_without_pools_a_document_balances_over_all_experts(ranks):
    options = {"kinds": SEQ_AUX, "score_function": "softmax", "per_token": False}
    _require_definition(ranks(1).run(_against_the_definition, pool=PoolConfig(), **options)[0])


@pytest.mark.parametrize("kinds", [{"aux_loss": 0.3}, ALL_KINDS])
def test_losses_count_neither_bias_nor_groups(ranks, kinds):
    (answer,) = ranks(1).run(
        _against_the_definition,
        pool=PoolConfig(pool_min=3),
        kinds=kinds,
        score_function="sigmoid",
        per_token=False,
        **GROUPS | {"moe_router_enable_expert_bias": True},
    )
    _require_definition(answer)


def _with_fused_choice():
    """Transformer Engine's choice, stood in for by one of other experts for token 0."""

    def choose(logits, topk, **options):
        found = moe_utils.topk_routing_with_score_function(logits, topk, **options)
        return tuple(torch.cat([x[:1].roll(1, dims=1), x[1:]]) for x in found)

    with mock.patch.multiple(moe_utils, HAVE_TE=True, fused_topk_with_score_function=choose):
        return _against_the_definition(PoolConfig(), {"seq_aux_loss": 0.2}, "softmax", False, moe_router_fusion=True)


def test_losses_count_what_a_fused_router_chooses(ranks):
    _require_definition(ranks(1).run(_with_fused_choice)[0])


def _beside_stock(kinds, options):
    tiny.setup()
    answers = []
    for pool in (None, PoolConfig()):
        router = _router(pool, kinds, **options)
        _set_bias(router)
        logits = torch.randn(16, 3, 8, generator=torch.Generator().manual_seed(2))
        answers.append(_route(router, logits.requires_grad_()))
    return answers


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"calculate_per_token_loss": True, "moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sqrtsoftplus"},
        GROUPS | {"moe_router_pre_softmax": True},
        GROUPS | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    ],
)
def test_without_pools_the_losses_are_megatrons(ranks, kind, options):
    # samples are not packed: each of the three is a document of its own in seq_aux_loss
    stock, ours = ranks(1).run(_beside_stock, kinds={kind: 0.3}, options=options)[0]
    assert torch.equal(ours[1], stock[1])
    torch.testing.assert_close(ours[0], stock[0], rtol=2e-5, atol=1e-8)
    assert ours[2] == pytest.approx(stock[2], rel=1e-5)
    assert NAMES[kind] in ours[2]


def _collectives(balances, options):
    """All-reduces of one layer in forward, and again in recompute, on two ranks that share documents."""
    tiny.setup(tensor_model_parallel_size=2)
    pool, counts = PoolConfig(pool_min=3), []
    for kinds in balances:
        router = _router(pool, kinds, **options)
        packed = tiny.packed([*BOUNDS[:-1], 32], tokens_per_sample=32)
        router.scope = tiny.scope(packed, pool, tokens=16, tp_rank=torch.distributed.get_rank(), tp_size=2)
        logits = torch.randn(16, 1, 8, requires_grad=True)
        for _ in range(2):
            with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as seen:
                router.routing(logits)
            counts.append(seen.call_count)
    return counts


@pytest.mark.parametrize("options", [{}, GROUPS])
def test_a_layer_has_three_collectives_at_most(ranks, options):
    # scores of documents; counts of experts; choices of documents
    wanted = {"none": 1, "global_aux_loss": 2, "aux_loss": 2, "seq_aux_loss": 3}
    wanted |= {"seq_aux_loss global_aux_loss": 3, "seq_aux_loss aux_loss global_aux_loss": 3}
    balances = [dict.fromkeys(kinds.split(), 0.0 if kinds == "none" else 0.1) for kinds in wanted]
    counts = [count for forward in wanted.values() for count in (forward, 0)]
    assert ranks(2).run(_collectives, balances=balances, options=options) == [counts] * 2
