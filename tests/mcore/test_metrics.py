"""Pool metrics: cheap in the passes, right in the log. Layouts are compared by tests/parallel/test_parity.py."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_logging, moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from support import tiny, training
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from emo_megatron import documents, ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore import spec_rewrite
from emo_megatron.mcore.context import CLOCK, scope_of
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.router_documents import RouterDocuments

POOLS = PoolConfig(pool_min=3)
LAYERS, MICRO_BATCHES = 4, 3
KERNELS = {"document_scores": 2, "select_pool": 1, "pool_topk": 3, "experts_used": 2, "document_statistics": 2}
"""Kernels and fills of a compiled operator on a GPU; any other operation counts as one."""
FREE = {
    *("view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("t", "transpose", "detach", "alias", "permute", "unbind", "split_with_sizes", "as_strided"),
    *("empty", "new_empty", "empty_like", "empty_strided", "split"),
}
"""Neither computes."""


class Operations(TorchDispatchMode):
    """Counts operations that compute: each is at least one launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in FREE:
            self.seen[name] += KERNELS.get(name, 1)
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return sum(self.seen.values())


def _one_launch(name, compute):
    """A function of Transformer Engine's, differentiable in its first argument and result, by one operation a pass."""

    def count(direction):
        mode = _get_current_dispatch_mode()
        if isinstance(mode, Operations):
            mode.seen[f"{name}_{direction}"] += 1

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, arguments):
            count("forward")
            with _disable_current_modes(), torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.result, *others = compute(ctx.x, **arguments)
            ctx.mark_non_differentiable(*others)
            ctx.set_materialize_grads(False)
            return ctx.result.detach(), *others

        @staticmethod
        def backward(ctx, gradient, *_):
            count("backward")
            with _disable_current_modes():
                return torch.autograd.grad(ctx.result, ctx.x, gradient)[0], None

    return Fused.apply


def _transformer_engine():
    """Stands in for its fused routing functions, each of the fewest operations it could be."""
    choose = moe_utils.topk_routing_with_score_function
    score = moe_utils.compute_routing_scores_for_aux_loss
    loss = moe_utils.switch_load_balancing_loss_func
    fused_choice = _one_launch("choose", choose)
    fused_scores = _one_launch("score", lambda x, **options: reversed(score(x, **options)))
    fused_loss = _one_launch("loss", lambda x, **options: (loss(x, **options),))
    return mock.patch.multiple(
        moe_utils,
        HAVE_TE=True,
        fused_topk_with_score_function=lambda logits, **options: fused_choice(logits, options),
        fused_compute_score_for_moe_aux_loss=lambda logits, **options: reversed(fused_scores(logits, options)),
        fused_moe_aux_loss=lambda probs, coeff, **options: fused_loss(probs, options | {"moe_aux_loss_coeff": coeff})[
            0
        ],
    )


def _routers(pool, layers, fusion):
    """Of every layer, with their metrics installed but for fusion; pool None: stock routers."""
    tiny.setup()
    routers = [tiny.router(pool, num_layers=layers, moe_router_fusion=fusion) for _ in range(layers)]
    if pool is None or fusion:
        # fused functions count nothing but the losses
        moe_logging.set_moe_metrics_tracker(moe_logging.MoEMetricsTracker())
    else:
        install_metrics(pool, routers[0].config, has_documents=True)
    for number, router in enumerate(routers, start=1):
        router.set_layer_number(number)
        router.train()
    return routers


def _step(pool, recomputes=False, layers=LAYERS, fusion=False):
    """Operations of every (micro-batch, layer), of the end of the step and of the report; pool None: stock routers."""
    routers = _routers(pool, layers, fusion)
    CLOCK.consumed_samples = 0
    logits = torch.randn(32, 1, 8, requires_grad=True)
    upstream = torch.randn(32, 8)
    passes = {}
    # boundaries are looked at on the host only: on a GPU that would mean waiting
    on_device = mock.patch.multiple(documents, _check_offsets_values=mock.Mock(), _check_samples=mock.Mock())
    for micro_batch in range(MICRO_BATCHES + 1):
        if micro_batch == 1:
            # the first one made the buffers
            moe_logging.get_moe_metrics_tracker().clear()
            for router in routers:
                router.reset_global_aux_loss_tracker()
        packed = tiny.packed([0, 5, 16, 28])
        documents_alone = RouterDocuments(cu_seqlens=packed.cu_seqlens_q, tokens_per_sample=16)
        shard = tiny.shard(microbatch=micro_batch)
        for router in routers:
            engine = _transformer_engine() if fusion else contextlib.nullcontext()
            with Operations() as operations, on_device, engine:
                options = {"hidden_shape": torch.Size((32, 1, 32)), "shard": shard, "pool": pool}
                if pool is not None and pool.pool_documents == "routers":
                    router.scope = documents_alone.scope_for(router.layer_number, **options)
                elif pool is not None:
                    router.scope = scope_of(packed, layer_number=router.layer_number, **options)
                if recomputes:
                    with torch.no_grad():
                        router.routing(logits)
                probs, _ = router.routing(logits)
                torch.autograd.grad([probs], [logits], [upstream])
            if micro_batch > 0:
                passes[micro_batch, router.layer_number] = operations.seen
    with Operations() as end:
        for router in routers:
            router.reset_global_aux_loss_tracker()
    with Operations() as report:
        moe_logging.get_moe_metrics_tracker().report(
            loss_scale=1 / MICRO_BATCHES,
            iteration=1,
            track_names=["global_load_balancing_loss", "z_loss"],
            num_layers=layers,
            moe_layer_freq=1,
            force_initialize=True,
        )
    CLOCK.consumed_samples = None
    return passes, end.count, report.count


HAS_COMPILED = pytest.mark.skipif(bool(ops.why_not_native("cpu")), reason="the compiled ops are not built")
FEATURES = {
    "routers": {"pool_documents": "routers"},
    "running": {"pool_balance": "running"},
    "top-p": {"pool_rule": "top_p", "pool_top_p": 0.7},
    "recompute": {},
}


@HAS_COMPILED
@pytest.mark.parametrize("feature", FEATURES)
def test_a_step_starts_no_more_operations_than_the_stock_routers(once, feature):
    totals = []
    for pool in (None, dataclasses.replace(POOLS, **FEATURES[feature])):
        passes, end, _ = once(1, _step, pool=pool, recomputes=feature == "recompute")[0]
        totals.append(sum(sum(seen.values()) for seen in passes.values()) + end)
    stock, ours = totals
    assert ours <= stock


@HAS_COMPILED
def test_pools_start_no_more_operations_than_fused_stock_routers(ranks):
    totals = []
    for pool in (None, POOLS):
        # the documents of a micro-batch are told apart once for all layers
        passes, end, _ = ranks(1).run(_step, pool=pool, layers=8, fusion=True)[0]
        for seen in passes.values():
            assert (seen["loss_forward"], seen["loss_backward"]) == ((1, 1) if pool is None else (0, 0))
            assert seen["choose_forward"] == seen["score_forward"] == (pool is None)
            assert seen["pool_topk_backward"] == (pool is not None)
        totals.append(sum(sum(seen.values()) for seen in passes.values()) + end)
    stock, ours = totals
    assert ours <= stock


@HAS_COMPILED
def test_pools_with_metrics_start_no_more_operations_than_the_stock_router(once):
    (stock, stock_end, stock_report), (ours, our_end, our_report) = (
        once(1, _step, pool=pool, recomputes=False)[0] for pool in (None, POOLS)
    )
    assert len(stock) == len(ours) == LAYERS * MICRO_BATCHES
    counts = {key: sum(seen.values()) for key, seen in ours.items()}
    stock_counts = {key: sum(seen.values()) for key, seen in stock.items()}
    assert max(counts.values()) <= max(stock_counts.values())
    total, stock_total = sum(counts.values()) + our_end, sum(stock_counts.values()) + stock_end
    assert total <= stock_total
    assert total + our_report <= stock_total + stock_report


def _stock_layers():
    """Builds models of Megatron's own layers, with the attention it lacks on a CPU."""

    class StockRouter(TopKRouter):
        def __init__(self, *args, pool, **kwargs):
            super().__init__(*args, **kwargs)

    return mock.patch.multiple(
        spec_rewrite, PoolTransformerLayer=TransformerLayer, PoolMoELayer=MoELayer, PoolRouter=StockRouter
    )


def _whole_step(case, is_stock):
    """Operations of a step's passes, the second one: what the first makes is there."""
    with _stock_layers() if is_stock else contextlib.nullcontext():
        chunks, _ = training.build(case, seed=1)
    if is_stock:
        moe_logging.set_moe_metrics_tracker(moe_logging.MoEMetricsTracker())
    else:
        install_metrics(training.pool_config(case), chunks[0].config, has_documents=True)
    # boundaries are looked at on the host only: on a GPU that would mean waiting
    on_device = mock.patch.multiple(documents, _check_offsets_values=mock.Mock(), _check_samples=mock.Mock())
    for step in range(2):
        CLOCK.consumed_samples = step * case.accumulation * case.dp
        for chunk in chunks:
            chunk.zero_grad_buffer()
        with Operations() as operations, on_device:
            loss = training.forward_backward(case, chunks, consumed=CLOCK.consumed_samples)
    CLOCK.consumed_samples = None
    training.break_cycles(chunks)
    return operations.seen, loss


@HAS_COMPILED
@pytest.mark.parametrize("dispatcher", ["megatron", "dedup"])
def test_a_step_with_overlap_starts_no_more_operations_than_megatrons_own(ranks, dispatcher):
    features = {"bf16": True, "overlap_moe_expert_parallel_comm": True}
    case = training.Case(dp=2, ep=2, accumulation=4, per_token=True, features=features)
    pools = dataclasses.replace(case, dispatcher=dispatcher)
    for (stock, loss), (ours, pool_loss) in zip(
        ranks(2).run(_whole_step, case=case, is_stock=True),
        ranks(2).run(_whole_step, case=pools, is_stock=False),
        strict=True,
    ):
        assert loss > 0
        assert pool_loss > 0
        assert "topk" in stock
        assert "pool_topk" in ours
        assert not {"pool_topk", "select_pool"} & stock.keys()
        assert sum(ours.values()) <= sum(stock.values())


def _reported(logits_TE, pool, padded=()):
    """What is logged of one micro-batch with these logits, the warnings, and the attached weights.

    Tokens `padded` are padding by Megatron's mask, those from 28 on by the boundaries.
    """
    tiny.setup()
    router = tiny.router(pool, num_layers=1)
    install_metrics(pool, router.config, has_documents=True)
    router.scope = tiny.scope(tiny.packed([0, 5, 16, 28]), pool)
    logits = logits_TE[:, None].clone().requires_grad_()
    padding_mask = torch.zeros(32, 1, dtype=torch.bool)
    padding_mask[list(padded)] = True
    probs, routing_map = router.routing(logits, padding_mask)
    (gradient,) = torch.autograd.grad([probs], [logits], [torch.zeros_like(probs)])
    writer = training.Writer()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        get_moe_metrics_tracker().report(
            loss_scale=1.0,
            iteration=1,
            writer=writer,
            track_names=["global_load_balancing_loss", "z_loss"],
            num_layers=1,
            moe_layer_freq=1,
            force_initialize=True,
        )
    messages = [str(warning.message) for warning in told]
    ids = router.scope.document_ids_T.masked_fill(padding_mask[:, 0], -1)
    pools = router.scope.pools.get(1)
    return writer.logged, messages, probs.detach(), routing_map, gradient, pools, ids


def _logits():
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pool", [POOLS, PoolConfig()], ids=["pools", "standard"])
def test_metrics_are_their_definition(ranks, pool):
    logged, messages, _, routing_map, _, pools, ids = ranks(1).run(
        _reported, logits_TE=_logits(), pool=pool, padded=(3, 17, 18)
    )[0]
    assert not [message for message in messages if "router" in message]
    valid = ids >= 0
    assert int(valid.sum()) == 25
    allowed = torch.ones(3, 8, dtype=torch.bool) if pools is None else pools
    logits = _logits().double()
    scores = logits.masked_fill(~allowed[ids.clamp(min=0)], -torch.inf).softmax(-1)[valid]
    load = routing_map[valid].sum(0).double()
    want = {
        "token_entropy": float(-torch.xlogy(scores, scores).sum(-1).mean()),
        "load_imbalance": float(load.max() / load.mean()),
        "nonfinite_tokens": 0.0,
        "experts_per_document": sum(int(routing_map[ids == document].any(0).sum()) for document in range(3)) / 3,
    }
    if pools is not None:
        sums = torch.stack([logits.softmax(-1)[ids == document].sum(0) for document in range(3)])
        shares = sums / sums.sum(-1, keepdim=True)
        want["pool_size"] = float(pools.sum() / 3)
        want["document_entropy"] = float(-torch.xlogy(shares, shares).sum(-1).mean())
    losses = {"global_load_balancing_loss", "z_loss"}
    assert logged.keys() == want.keys() | losses
    for name, value in want.items():
        assert logged[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_reported_and_reach_the_loss(ranks, bad):
    logits = _logits()
    clean = ranks(1).run(_reported, logits_TE=logits, pool=POOLS)[0]
    # outside and inside its pool, in padding, and both in one document
    logits[7, int((~clean[5][1]).nonzero()[0])] = bad
    logits[8, int(clean[5][1].nonzero()[0])] = bad
    logits[30, 2] = bad
    logged, messages, probs, routing_map, gradient, _, _ = ranks(1).run(_reported, logits_TE=logits, pool=POOLS)[0]
    assert logged["nonfinite_tokens"] == 2.0
    assert [message for message in messages if "layer 1" in message]
    assert all(value == value and abs(value) < 1e6 for value in logged.values())
    assert routing_map.sum(1).tolist() == [2] * 32
    is_nan = probs.isnan().any(1)
    assert is_nan.nonzero().flatten().tolist() == [7, 8]
    assert not probs[28:].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("layout", [{"tp": 2}, {"dp": 2}], ids=["TP2", "DP2"])
def test_the_standard_model_logs_the_same_in_every_layout(ranks, layout):
    case = training.Case(pools=False, accumulation=2, **layout)
    want = ranks(1).run(training.train, case=case.reference, seed=1)[0]["metrics"]
    assert {"experts_per_document", "token_entropy", "load_imbalance"} < want.keys()
    assert "pool_size" not in want
    for got in ranks(2).run(training.train, case=case, seed=1):
        assert got["metrics"] == pytest.approx(want, rel=1e-5)


def _logged_by_stages():
    """What the stages of the hybrid model `*-*-|*E*E/*E` log, the first of which has no MoE layer."""
    tiny.setup(pipeline_model_parallel_size=2)
    config = tiny.transformer_config(num_layers=8, mtp_num_layers=1)
    config.is_hybrid_model = True
    install_metrics(POOLS, config, has_documents=True)
    tracker = get_moe_metrics_tracker()
    if parallel_state.is_pipeline_last_stage():
        for layer in (6, 8, 9):
            tracker.record("z_loss", torch.tensor(float(layer)), layer, 9)
    writer = training.Writer()
    tracker.report(
        loss_scale=1.0,
        iteration=1,
        writer=writer,
        force_initialize=True,
        track_names=["z_loss"],
        # all MoE layers of the pattern, those of multi-token prediction too
        num_layers=3,
        moe_layer_freq=1,
        mtp_num_layers=1,
    )
    return writer.logged["z_loss"]


def test_a_stage_without_experts_logs_what_the_others_do(ranks):
    assert ranks(2).run(_logged_by_stages) == [pytest.approx((6 + 8 + 9) / 3)] * 2
