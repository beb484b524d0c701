"""PoolRouter and the layers around it, in one process of real Megatron."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.router import PoolRouter, tell_backend
from emo_megatron.ops import native

POOLS = PoolConfig(pool_min=3)


def _train_step(model, cu_seqlens, seed=0, **packed_overrides):
    model.zero_grad()
    model(
        **tiny.batch(seed), attention_mask=None, packed_seq_params=tiny.packed(cu_seqlens, **packed_overrides)
    ).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _routers(model):
    return [m for m in model.modules() if isinstance(m, PoolRouter)]


@contextlib.contextmanager
def _fused_choice():
    """Transformer Engine's fused choice, stood in for by one of other weights, and of other experts for token 0."""

    def choose(logits, topk, **options):
        probs, routing_map = moe_utils.topk_routing_with_score_function(logits, topk, **options)
        return tuple(torch.cat([x[:1].roll(1, dims=1), x[1:]]) for x in (probs * 0.75, routing_map))

    fused = mock.Mock(side_effect=choose)
    with mock.patch.multiple(moe_utils, HAVE_TE=True, fused_topk_with_score_function=fused):
        yield fused


def _check_stock_equality(**overrides):
    tiny.setup()
    stock, ours = (
        tiny.router(pool, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None, **overrides) for pool in (None, PoolConfig())
    )
    ours.load_state_dict(stock.state_dict())
    if stock.expert_bias is not None:
        for router in (stock, ours):
            router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    hidden = torch.randn(SEQ_LENGTH, 2, 32, requires_grad=True)
    upstream = torch.randn(SEQ_LENGTH * 2, 8)
    results = []
    for router in (stock, ours):
        with _fused_choice() as fused:
            probs, routing_map = router(hidden)
        assert fused.call_count == router.config.moe_router_fusion
        grads = torch.autograd.grad((probs * upstream).sum(), [hidden, router.weight])
        counted = router.local_tokens_per_expert
        counts = torch.zeros(8) if counted is None else counted.clone()
        results.append((probs.detach(), routing_map, counts, *grads))
    return [bool(torch.equal(a, b)) for a, b in zip(*results, strict=True)]


SEQ_LENGTH = 37
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 3}


@pytest.mark.parametrize(
    "overrides",
    [
        {"moe_router_pre_softmax": True},
        {"moe_router_pre_softmax": False},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True},
        GROUPS | {"moe_router_pre_softmax": True},
        GROUPS | {"moe_router_pre_softmax": False},
        GROUPS | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        GROUPS | {"moe_router_pre_softmax": True, "moe_router_fusion": True},
        {"moe_router_pre_softmax": True, "moe_router_fusion": True},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_fusion": True},
    ],
    ids=lambda o: "-".join(f"{k.removeprefix('moe_router_')}={v}" for k, v in o.items()),
)
def test_without_pools_it_is_the_stock_router_bit_for_bit(ranks, overrides):
    assert ranks(1).run(_check_stock_equality, **overrides) == [[True] * 5]


def _backends(environment):
    tiny.setup()
    tell_backend.cache_clear()
    os.environ.update(environment)
    told = io.StringIO()
    try:
        model = tiny.model(POOLS)
        with contextlib.redirect_stdout(told):
            gradients = _train_step(model, [0, 5, 16, 32])
        taken = {router.backend(torch.zeros(1, 8)) for router in _routers(model)}
    finally:
        for name in environment:
            del os.environ[name]
        tell_backend.cache_clear()
    return taken, told.getvalue(), gradients


def test_the_compiled_ops_route_and_a_fallback_is_told_once(ranks):
    (compiled,) = ranks(1).run(_backends, environment={})
    (plain,) = ranks(1).run(_backends, environment={"EMO_OPS": "reference"})
    assert compiled[:2] == ({"native"}, "")
    assert plain[:2] == (
        {"reference"},
        "emo_megatron: routing runs in plain PyTorch, which is slower: EMO_OPS=reference is set\n",
    )
    for name, want in plain[2].items():
        torch.testing.assert_close(compiled[2][name], want, rtol=1e-4, atol=1e-6, msg=name)


def _failing_probe():
    """The backends of three micro-batches, the first of which meets a probe that fails once; what was said."""
    tiny.setup()
    tell_backend.cache_clear()
    told, taken = io.StringIO(), []
    try:
        model = tiny.model(POOLS)
        for step in range(3):
            failure = "out of memory" if step == 0 else ""
            probe = mock.patch.object(native, "why_no_kernels", return_value=failure)
            packed = tiny.packed([0, 5, 16, 32])
            with contextlib.redirect_stdout(told), probe if step == 0 else contextlib.nullcontext():
                model(**tiny.batch(0), attention_mask=None, packed_seq_params=packed)
            taken.append(set(packed.emo_scope.backends.values()))
    finally:
        tell_backend.cache_clear()
    return taken, told.getvalue().count("out of memory")


def test_a_probe_that_failed_is_tried_again(ranks):
    taken, told = ranks(1).run(_failing_probe)[0]
    assert taken == [{"reference"}, {"native"}, {"native"}]
    assert told == 1


def _pools_and_choices():
    tiny.setup()
    model = tiny.model(POOLS)
    seen = []
    for router in _routers(model):
        routing = router.routing

        def spy(logits, padding_mask=None, *, router=router, routing=routing):
            probs, routing_map = routing(logits, padding_mask)
            scope = router.scope
            seen.append((scope.document_ids_T, scope.pools[router.layer_number], routing_map))
            return probs, routing_map

        router.routing = spy
    _train_step(model, [0, 5, 5, 16, 17, 32])
    return [
        (ids.tolist(), pool.sum(1).tolist(), bool((routing_map <= pool[ids]).all())) for ids, pool, routing_map in seen
    ]


def test_every_token_chooses_inside_its_documents_pool(ranks):
    seen = ranks(1).run(_pools_and_choices)[0]
    assert len(seen) == 2
    for ids, sizes, inside in seen:
        assert ids == [0] * 5 + [2] * 11 + [3] + [4] * 15
        assert all(3 <= size <= 8 for size in sizes)
        assert inside
    assert seen[0][1] != seen[1][1], "layers draw sizes of their own"


def _without_boundaries():
    tiny.setup()
    model = tiny.model(POOLS)
    try:
        model(**tiny.batch(0), attention_mask=None)
    except ValueError as error:
        message = str(error)
    model.eval()
    evaluated = model(**tiny.batch(0), attention_mask=None)
    return message, bool(torch.isfinite(evaluated).all())


def test_training_without_boundaries_names_the_flag_and_evaluation_needs_none(ranks):
    message, is_finite = ranks(1).run(_without_boundaries)[0]
    assert "--dataloader-inter-document-masking" in message
    assert is_finite


def _two_in_flight(balance, **recompute):
    """Gradients of two micro-batches whose backwards run after both forwards, first one first (as in 1F1B)."""
    tiny.setup()
    model = tiny.model(PoolConfig(pool_min=3, pool_balance=balance), **recompute)
    losses = []
    for seed, bounds in ((0, [0, 5, 16, 32]), (1, [0, 16, 19, 30, 32])):
        for layer in model.decoder.layers:
            layer.current_microbatch = seed
        losses.append(model(**tiny.batch(seed), attention_mask=None, packed_seq_params=tiny.packed(bounds)).mean())
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["selective", "full"],
)
@pytest.mark.parametrize("balance", ["micro", "running"])
def test_recompute_sees_its_own_micro_batch(ranks, recompute, balance):
    want = ranks(1).run(_two_in_flight, balance=balance)[0]
    got = ranks(1).run(_two_in_flight, balance=balance, **recompute)[0]
    for name, gradient in want.items():
        assert torch.equal(gradient, got[name]), name


def _same_params_twice():
    tiny.setup()
    model = tiny.model(POOLS)
    params = tiny.packed([0, 5, 16, 32])
    sizes = []
    for consumed in (0, 2):
        CLOCK.consumed_samples = consumed
        model(**tiny.batch(0), attention_mask=None, packed_seq_params=params)
        sizes.append([params.emo_scope.pools[layer].sum(1).tolist() for layer in (1, 2)])
    CLOCK.consumed_samples = None
    return sizes


def test_reused_packed_seq_params_draw_anew(ranks):
    first, second = ranks(1).run(_same_params_twice)[0]
    assert first != second


def _gradients_with_and_without_fusion():
    tiny.setup()
    model = tiny.model(POOLS)
    found = []
    for fusion in (False, True):
        for router in _routers(model):
            router.config.moe_router_fusion = fusion
        found.append(_train_step(model, [0, 5, 16, 32]))
    return found


def test_with_pools_the_compiled_op_is_the_fusion(ranks):
    # without Transformer Engine, which a call would miss
    apart, fused = ranks(1).run(_gradients_with_and_without_fusion)[0]
    assert all(torch.equal(fused[name], apart[name]) for name in apart)


def _steps_around_the_delay(**overrides):
    """Gradients of a step before and one after the start of the pools, by configuration; pools in evaluation."""
    tiny.setup()
    late = PoolConfig(pool_min=3, pool_max=5, pool_delay_samples=8, pool_eval=4)
    early = PoolConfig(pool_min=3, pool_max=5, pool_eval=4)
    found = {}
    for name, pool in {"late": late, "early": early, "off": PoolConfig()}.items():
        model = tiny.model(pool, **overrides)
        model.load_state_dict(_state(model))
        for consumed in (7, 8):
            CLOCK.consumed_samples = consumed
            with _fused_choice() as fused:
                found[name, consumed] = _train_step(model, [0, 5, 16, 32]), fused.call_count
        if name != "off":
            CLOCK.consumed_samples = 0
            params = tiny.packed([0, 5, 16, 32])
            model.eval()(**tiny.batch(0), attention_mask=None, packed_seq_params=params)
            found[name, "evaluation"] = [pool.sum(1).tolist() for pool in params.emo_scope.pools.values()]
    CLOCK.consumed_samples = None
    return found


def _state(model):
    generator = torch.Generator().manual_seed(3)
    return {
        name: value if value is None else torch.randn(value.shape, generator=generator) * 0.3
        for name, value in model.state_dict().items()
        if value is None or value.is_floating_point()
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        {"moe_router_fusion": True, "moe_router_pre_softmax": True},
    ],
    ids=["plain", "recompute", "fusion"],
)
def test_pools_that_start_late_are_the_standard_moe_before_and_pools_after(ranks, overrides):
    found = ranks(1).run(_steps_around_the_delay, **overrides)[0]

    def is_same(one, other):
        return one[1] == other[1] and all(torch.equal(one[0][n], other[0][n]) for n in one[0])

    assert is_same(found["late", 7], found["off", 7])
    assert is_same(found["late", 8], found["early", 8])
    assert not is_same(found["late", 7], found["early", 7])
    assert not is_same(found["late", 8], found["off", 8])
    assert found["late", "evaluation"] == found["early", "evaluation"] == [[4] * 3] * 2


def _skewed_sizes():
    tiny.setup()
    sizes = []
    for skew in (1.0, 8.0):
        params = tiny.packed([0, 5, 16, 32])
        model = tiny.model(PoolConfig(pool_min=3, pool_skew=skew))
        model(**tiny.batch(0), attention_mask=None, packed_seq_params=params)
        sizes.append(torch.stack([pool.sum(1) for pool in params.emo_scope.pools.values()]))
    return sizes


def test_the_skew_reaches_the_draw(ranks):
    uniform, skewed = ranks(1).run(_skewed_sizes)[0]
    assert (uniform <= skewed).all()
    assert (uniform < skewed).any()


def _evaluation_equals_stock():
    tiny.setup()
    ours = tiny.model(PoolConfig(pool_min=3)).eval()
    stock = tiny.model().eval()
    stock.load_state_dict(ours.state_dict())
    arguments = {**tiny.batch(3), "attention_mask": None}
    # one document of the whole length: stock local attention takes no packed sequences
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
    return (stock(**(arguments | {"attention_mask": mask})) - ours(**arguments)).abs().max().item()


def test_evaluation_without_pools_is_the_stock_model(ranks):
    assert ranks(1).run(_evaluation_equals_stock)[0] < 1e-5


def _documents_apart():
    tiny.setup()
    model = tiny.model(POOLS)
    batch = tiny.batch(5)
    together = model(**batch, attention_mask=None, packed_seq_params=tiny.packed([0, 5, 16, 32]))
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][0, 5:16] = 1
    other = model(**changed, attention_mask=None, packed_seq_params=tiny.packed([0, 5, 16, 32]))
    same = (together - other).abs()[0]
    return same[:5].max().item(), same[5:16].max().item(), same[16:].max().item()


def test_documents_do_not_see_each_other(ranks):
    before, itself, after = ranks(1).run(_documents_apart)[0]
    assert before < 1e-6
    assert after < 1e-6
    assert itself > 1e-3


def _counted_for_the_bias():
    """What aux-loss-free balancing counts of a micro-batch with padding, and the map's own count."""
    tiny.setup()
    router = tiny.router(PoolConfig(), moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    padding = torch.zeros(32, 1, dtype=torch.bool)
    padding[20:] = True
    _, routing_map = router.routing(torch.randn(32, 1, 8), padding)
    counted = router.local_tokens_per_expert.clone()
    with torch.no_grad():
        router.routing(torch.randn(32, 1, 8), padding)
    return counted, router.local_tokens_per_expert, routing_map[:20].sum(0).float()


def test_padding_does_not_count_for_the_expert_bias(ranks):
    counted, after_no_grad, want = ranks(1).run(_counted_for_the_bias)[0]
    assert torch.equal(counted, want)
    assert torch.equal(after_no_grad, want)


def _running_counts():
    """What the running balance divides by in the second micro-batch of a step and in the next step."""
    tiny.setup()
    model = tiny.model(PoolConfig(pool_min=3, pool_balance="running"))
    router = _routers(model)[0]
    seen = []
    for seed in (0, 1, 2):
        params = tiny.packed([0, 5, 16, 32])
        model(**tiny.batch(seed), attention_mask=None, packed_seq_params=params).mean().backward()
        counts = params.emo_scope.counts[1]
        fraction, population = counts.fraction, counts.population
        seen.append((fraction.tokens_per_expert_E, population.tokens_per_expert_E, int(fraction.num_tokens)))
        if seed == 1:
            router.reset_global_aux_loss_tracker()
    return seen


def test_running_balance_counts_the_step_so_far(ranks):
    first, second, next_step = ranks(1).run(_running_counts)[0]
    assert [row[2] for row in (first, second, next_step)] == [32, 64, 32]
    assert torch.equal(second[0], first[1] + second[1])
    assert torch.equal(next_step[0], next_step[1])
