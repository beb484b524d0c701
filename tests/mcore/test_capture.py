"""Scope, routing, losses, metrics and backward never wait for the device, and no shape depends on data.

Fake tensors have no values, so reading one, or a shape that follows from one, raises. Those of the device "meta" are
no host tensors, whose values are looked at; they are treated as a GPU's are.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support import tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import context
from emo_megatron.mcore.metrics import install_metrics
from emo_megatron.mcore.router_documents import RouterDocuments

EXPERTS, TOKENS, SAMPLE, NUM_DOCUMENTS = 8, 32, 16, 9
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
}
CASES: dict[str, dict[str, Any]] = {
    "uniform": {"pool": {}},
    "fixed size": {"pool": {"pool_max": 3}},
    "falling bound": {"pool": {"pool_min_decay_samples": 9}},
    "skewed sizes": {"pool": {"pool_skew": 2.5}},
    "before the pools start": {"pool": {"pool_delay_samples": 1}},
    "unrestricted share": {"pool": {"pool_unrestricted": 0.2}},
    "top-p": {"pool": {"pool_rule": "top_p", "pool_top_p": 0.7}},
    "running": {"pool": {"pool_balance": "running"}},
    "whole samples": {"pool": {"pool_scope": "sample"}},
    "forced experts": {"pool": {"pool_forced": 1}},
    "EOS rule": {"pool": {"pool_eos_starts_document": True}},
    "selection": {"pool": {"pool_mask": "selection"}},
    "evaluation pool": {"pool": {"pool_eval": 3}, "is_training": False},
    "evaluation without pools": {"pool": {}, "is_training": False},
    "trailing padding": {"pool": {}, "has_tails": True},
    "CP2 by sample": {"pool": {}, "cp": 2},
    "CP2 by document": {"pool": {"pool_cp_partition": "document"}, "is_padded": True, "cp": 2},
    "CP2, padded after packing": {
        "pool": {"pool_cp_partition": "document"},
        **{"cp": 2, "is_moved": True, "has_tails": True},
    },
    "multi-token prediction": {"pool": {}, "depth": 2},
    "multi-token prediction, CP2, padded after packing": {
        "pool": {"pool_cp_partition": "document", "pool_eos_starts_document": True},
        **{"cp": 2, "is_moved": True, "depth": 1},
    },
    "sigmoid with bias": {"pool": {}, "config": SIGMOID},
    "post-softmax": {"pool": {}, "config": {"moe_router_pre_softmax": False}},
    "boundaries for the routers": {"pool": {"pool_documents": "routers"}, "has_tails": True},
    "restricted experts": {"pool": {}, "is_restricted": True},
    "pools off": {"pool": {"pool_min": None}},
}


def _scope(
    pool: PoolConfig, *, cp: int, is_padded: bool = False, is_moved: bool = False, has_tails: bool = False
) -> Any:
    """The scope of a micro-batch whose boundaries have no values."""
    shard = tiny.shard(cp_size=cp)
    shape = torch.Size([TOKENS // cp, 1, 32])
    bounds = torch.empty(NUM_DOCUMENTS + 1, dtype=torch.int32)
    tails_B = torch.empty(TOKENS // SAMPLE, dtype=torch.int64) if has_tails else None
    if pool.pool_documents == "routers":
        documents = RouterDocuments(cu_seqlens=bounds, tokens_per_sample=SAMPLE, num_padding_B=tails_B)
        return documents.scope_for(1, hidden_shape=shape, shard=shard, pool=pool)
    bounds_of = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), bounds)
    if is_padded:
        bounds_of |= dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), bounds)
    sizes = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv", "tokens_per_sample"), SAMPLE)
    packed = PackedSeqParams(qkv_format="thd", **bounds_of, **sizes)
    if not is_padded:
        packing = context.Packing(
            cu_seqlens=torch.empty_like(bounds) if is_moved else bounds,
            tokens_per_sample=SAMPLE // 2 if is_moved else SAMPLE,
            num_samples=TOKENS // SAMPLE,
            num_padding_B=tails_B,
        )
        setattr(packed, context.PACKING, packing)
    return context.scope_of(packed, hidden_shape=shape, shard=shard, pool=pool, layer_number=1)


def _forward_and_backward(
    backend: str,
    pool: dict[str, Any],
    config: dict[str, Any] | None = None,
    cp: int = 1,
    depth: int = 0,
    is_training: bool = True,
    is_restricted: bool = False,
    **forms: bool,
) -> list[Any]:
    """Device and shapes of what the second micro-batch of a step gives: probs, map, gradient."""
    tiny.setup()
    options = (config or {}) | {"mtp_num_layers": depth or None}
    pools = PoolConfig(**({"pool_min": 3} | pool))
    install_metrics(pools, tiny.transformer_config(**options), has_documents=True)
    with FakeTensorMode(), torch.device("meta"), contextlib.ExitStack() as stack:
        stack.callback(setattr, context.CLOCK, "consumed_samples", None)
        context.CLOCK.consumed_samples = 0
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
        router = tiny.router(pools, **options)
        router.backend = lambda logits_TE: backend
        router.is_mtp_layer = depth > 0
        router.set_layer_number(depth or 1)
        router.train(is_training)
        # Megatron makes these on the machine's own device, whatever the default is
        for name, buffer in list(router.named_buffers()):
            setattr(router, name, torch.empty_like(buffer, device="meta"))
        if is_restricted:
            router.allowed_experts = torch.empty(EXPERTS, dtype=torch.bool)
        for _ in range(2):
            router.scope = _scope(pools, cp=cp, **forms)
            logits = torch.empty(TOKENS // cp, 1, EXPERTS, requires_grad=True)
            probs, routing_map = router.routing(logits)
            probs.sum().backward()
        results = [probs, routing_map, logits.grad]
        return [(value.device.type, tuple(value.shape)) for value in results]


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "native"])
def test_no_configuration_waits_or_has_shapes_that_depend_on_data(ranks, backend):
    for name, case in CASES.items():
        tokens = TOKENS // case.get("cp", 1)
        flat = ("meta", (tokens, EXPERTS))
        got = ranks(1).run(_forward_and_backward, backend=backend, **case)[0]
        assert got == [flat, flat, ("meta", (tokens, 1, EXPERTS))], name


def _look_at_a_value():
    # an error that left the rank would end it, and the next test would wait for another
    with pytest.raises(DataDependentOutputException):
        _forward_and_backward(backend="reference", pool={"pool_check": True})


def test_a_value_that_is_looked_at_is_found(ranks):
    ranks(1).run(_look_at_a_value)
