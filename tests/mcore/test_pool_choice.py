"""What a router's pools are chosen by: the expert bias, groups of experts; and the metrics that tell of both."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.metrics import install_metrics

BOUNDS = [0, 9, 9, 20, 32]
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _route(pool, options, bias):
    """Pools, choices and logits of one micro-batch, and what is logged of it."""
    tiny.setup()
    router = tiny.router(pool, **options)
    if bias is not None:
        router.expert_bias.copy_(torch.tensor(bias))
    install_metrics(pool, router.config, has_documents=True)
    router.scope = tiny.scope(tiny.packed(BOUNDS, tokens_per_sample=32), pool)
    logits = torch.randn(32, 1, 8, generator=torch.Generator().manual_seed(5))
    # an expert that no token likes
    logits[..., 3] -= 30.0
    _, routing_map = router.routing(logits)
    tracker = get_moe_metrics_tracker()
    tracker._make_ratios(1.0)
    logged = {name: float(tracker.metrics[name].values[0]) for name in tracker.names}
    return router.scope.pools[1], routing_map, logits[:, 0], logged


def _gates(logits, document):
    return logits[BOUNDS[document] : BOUNDS[document + 1]].double().sigmoid()


@pytest.mark.parametrize("bias", [[0.0] * 8, [0.0, 0.1, 0.0, 0.9, 0.0, -0.2, 0.0, 0.0]])
def test_the_bias_reaches_the_pool(ranks, bias):
    pool = PoolConfig(pool_min=4, pool_max=4, pool_score="gate_with_bias")
    pools, _, logits, logged = ranks(1).run(_route, pool=pool, options=BIASED, bias=bias)[0]
    for document in (0, 2, 3):
        score = _gates(logits, document).mean(0) + torch.tensor(bias).double()
        assert set(pools[document].nonzero().flatten().tolist()) == set(score.topk(4).indices.tolist())
    assert bool(pools[[0, 2, 3], 3].any()) == (bias[3] > 0)
    taken = pools[[0, 2, 3]].any(0)
    assert logged["experts_in_no_pool"] == (~taken).sum()


def test_probabilities_do_not_see_the_bias(ranks):
    pool = PoolConfig(pool_min=4, pool_max=4)
    bias = [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    pools, _, logits, logged = ranks(1).run(_route, pool=pool, options=BIASED, bias=bias)[0]
    for document in (0, 2, 3):
        mean = logits[BOUNDS[document] : BOUNDS[document + 1]].softmax(-1).mean(0)
        assert set(pools[document].nonzero().flatten().tolist()) == set(mean.topk(4).indices.tolist())
    assert not pools[[0, 2, 3], 3].any()
    assert logged["experts_in_no_pool"] >= 1


def test_pools_of_all_experts_leave_none_out_and_count_for_nothing(ranks):
    pool = PoolConfig(pool_min=8, pool_score="gate_with_bias")
    _, _, _, logged = ranks(1).run(_route, pool=pool, options=BIASED, bias=[0.0] * 8)[0]
    assert logged["experts_in_no_pool"] == 8


def _groups_of(experts_E):
    return {int(e) // 2 for e in experts_E.nonzero().flatten()}


@pytest.mark.parametrize("options", [{}, BIASED])
def test_a_pool_inside_groups_and_an_unrestricted_one(ranks, options):
    pool = PoolConfig(pool_min=3, pool_group_scope="document", pool_unrestricted=0.5)
    pools, routing_map, _, logged = ranks(1).run(_route, pool=pool, options=GROUPS | options, bias=None)[0]
    sizes = pools.sum(-1).tolist()
    assert set(sizes) <= {3, 4, 8}
    assert {8} < set(sizes)
    for document, size in enumerate(sizes):
        # four experts in two groups of two
        assert len(_groups_of(pools[document])) == (4 if size == 8 else 2)
    # the token limit holds in unrestricted documents too
    assert all(len(_groups_of(chosen)) <= 2 for chosen in routing_map)
    assert logged["tokens_over_groups"] == 0.0


def test_tokens_of_thin_pools_are_counted(ranks):
    # two experts a pool, in two groups as a rule, where a token should use one
    options = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
    pool = PoolConfig(pool_min=2, pool_max=2)
    _, routing_map, _, logged = ranks(1).run(_route, pool=pool, options=options, bias=None)[0]
    over = sum(len(_groups_of(chosen)) > 1 for chosen in routing_map)
    assert over > 0
    assert logged["tokens_over_groups"] == pytest.approx(over / 32)
