"""Flex dispatchers send what the pool router routes: padding nowhere, a saturated token to its own experts."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from support import tiny

from emo_megatron import ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.dispatcher import follow_routing_map

T, E, K = 96, 16, 4


def _routed():
    """Half of the tokens are padding; one token's weights underflow at all experts of its pool but one."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    logits[1] = -200.0
    logits[1, 13] = 0.0
    ids = torch.arange(T) // (T // 4)
    ids[torch.arange(T) % 8 >= 4] = -1
    pool = torch.zeros(4, E, dtype=torch.bool)
    for document in range(4):
        pool[document, document * 2 : document * 2 + 8] = True
    pool[0, 8:] = True
    pool[0, :8] = False
    return ids, ops.pool_topk(logits, document_ids_T=ids, pool_DE=pool, top_k=K)


@pytest.mark.parametrize("kind", ["_DeepepManager", "_NCCLEPManager"])
def test_managers_follow_the_map(kind):
    ids, routed = _routed()
    manager = object.__new__(getattr(token_dispatcher, kind))
    vars(manager).update(num_experts=E, router_topk=K, capacity_factor=None)
    dispatcher = SimpleNamespace(_comm_manager=manager)
    backend = {"_DeepepManager": "deepep", "_NCCLEPManager": "ncclep"}[kind]
    config = SimpleNamespace(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend)
    sent_map = routed.routing_map_TE & (ids >= 0)[:, None]

    def sent():
        probs = routed.probs_TE.clone().requires_grad_()
        manager.setup_metadata(sent_map, probs)
        return probs, [set(row.tolist()) - {-1} for row in manager.token_indices]

    want = [set(row.nonzero().flatten().tolist()) for row in sent_map]
    _, stock = sent()
    assert stock != want, "what Megatron does alone; if it is right, the wrapper can go"

    follow_routing_map(dispatcher, config)
    probs, found = sent()
    assert found == want
    assert all(len(experts) == (K if document >= 0 else 0) for document, experts in zip(ids, found, strict=True))
    weights = torch.zeros(T, E).scatter_add_(1, manager.token_indices.clamp(min=0), manager.token_probs.detach())
    assert torch.equal(weights, routed.probs_TE * sent_map)
    (gradient,) = torch.autograd.grad(manager.token_probs.sum(), [probs])
    assert torch.equal(gradient[ids >= 0], sent_map[ids >= 0].float())


def _maps(dispatcher, backend):
    """How many experts the layer's router sends a real token and a padded one to."""
    tiny.setup()
    options = {"moe_token_dispatcher_type": dispatcher, "moe_flex_dispatcher_backend": backend}
    router = tiny.router(PoolConfig(), **options)
    padding = torch.zeros(32, 1, dtype=torch.bool)
    padding[20:] = True
    _, routing_map = router.routing(torch.randn(32, 1, 8), padding)
    sums = routing_map.sum(1)
    return set(sums[:20].tolist()), set(sums[20:].tolist())


@pytest.mark.parametrize(
    ("dispatcher", "backend", "padded"),
    [
        ("alltoall", "deepep", 2),
        ("allgather", "deepep", 2),
        ("flex", "deepep", 0),
        ("flex", "hybridep", 0),
        ("flex", "ncclep", 2),
    ],
)
def test_padding_is_sent_where_a_dispatcher_needs_it(ranks, dispatcher, backend, padded):
    assert ranks(1).run(_maps, dispatcher=dispatcher, backend=backend)[0] == ({2}, {padded})


LIBRARIES = {
    "deepep": ("fused_dispatch", "fused_combine", "set_deepep_num_sms"),
    "hybridep": ("hybrid_ep_dispatch", "hybrid_ep_combine"),
    "ncclep": ("nccl_ep_dispatch", "nccl_ep_combine"),
}


def _sent_by_a_layer(backend):
    """Where a layer routes every token of a micro-batch, with which weights, and where its manager would send it."""
    tiny.setup(expert_model_parallel_size=2)
    CLOCK.consumed_samples = 0
    pool = PoolConfig(pool_min=3)
    # the libraries need GPUs; what they would be given is settled before
    library = dict.fromkeys(LIBRARIES[backend], mock.Mock())
    with mock.patch.multiple(token_dispatcher, **library):
        layer = tiny.model(
            pool,
            moe_token_dispatcher_type="flex",
            moe_flex_dispatcher_backend=backend,
            moe_expert_rank_capacity_factor=2.0 if backend == "ncclep" else None,
        )
    layer = layer.decoder.layers[0].mlp
    hidden = torch.randn(32, 1, 32, generator=torch.Generator().manual_seed(1))
    # softmax gives all but one expert a weight of exactly 0
    hidden[3] *= 1e4
    layer.scope = tiny.scope(tiny.packed([0, 5, 16, 32], num_padding=[0, 6]), pool)
    probs, routing_map = layer.route(hidden)
    layer.token_dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    CLOCK.consumed_samples = None
    manager = layer.token_dispatcher._comm_manager
    sent = manager.routing_map if backend == "hybridep" else manager.token_indices
    return routing_map, probs.detach(), sent


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_layer_sends_by_the_map(ranks, backend):
    for routing_map, probs, sent in ranks(2).run(_sent_by_a_layer, backend=backend):
        weights = probs[3][routing_map[3]]
        assert sorted(weights.tolist()) == [0.0, 1.0]
        if backend != "hybridep":
            rows = [set(row.tolist()) - {-1} for row in sent]
            sent = torch.tensor([[expert in row for expert in range(8)] for row in rows])
        assert torch.equal(sent, routing_map)
        assert set(sent[:26].sum(1).tolist()) == {2}
        # whether NCCL EP takes tokens that go nowhere is not documented
        assert set(sent[26:].sum(1).tolist()) == {2 if backend == "ncclep" else 0}
