"""Scope, routing, losses and backward never wait for the device, and no shape depends on data: fake tensors show it.

Fake tensors have no values, so reading one, or a shape that follows from one, raises. On the device "meta" they are no
host tensors, and what is looked at on the host only is passed over, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emo_megatron.config import PoolConfig

EXPERTS, TOKENS, SAMPLE, NUM_DOCUMENTS = 8, 32, 16, 9
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_pre_softmax": False,
}
CASES: dict[str, dict[str, Any]] = {
    "uniform": {"pool": {}},
    "schedule and unrestricted": {"pool": {"pool_min_decay_samples": 9, "pool_unrestricted": 0.2}},
    "top-p": {"pool": {"pool_rule": "top_p", "pool_top_p": 0.7}},
    "running": {"pool": {"pool_balance": "running"}},
    "whole samples": {"pool": {"pool_scope": "sample"}},
    "EOS rule": {"pool": {"pool_eos_starts_document": True}},
    "trailing padding": {"pool": {}, "has_tails": True},
    "CP2 by document": {"pool": {"pool_cp_partition": "document"}, "padded": True, "cp": 2},
    "sigmoid with bias": {"pool": {}, "config": SIGMOID},
    "pools off": {"pool": {"pool_min": None}},
}


def _forward_and_backward(backend, pool, config=None, has_tails=False, padded=False, cp=1):
    """What came out of one layer's routing of two micro-batches, and whether it had a gradient."""
    import contextlib

    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from support import tiny
    from torch._subclasses.fake_tensor import FakeTensorMode

    from emo_megatron.mcore import context
    from emo_megatron.mcore.metrics import install_metrics
    from emo_megatron.mcore.router import PoolRouter

    tiny.setup()
    configuration = tiny.transformer_config(**(config or {}))
    pools = PoolConfig(**({"pool_min": 3} | pool))
    install_metrics(pools, configuration, has_documents=True)
    shard = context.Shard(
        tp_rank=0, tp_size=1, cp_rank=0, cp_size=cp, dp_rank=0, dp_size=1, microbatch=0
    )
    with FakeTensorMode(), torch.device("meta"), contextlib.ExitStack() as stack:
        stack.callback(setattr, context.CLOCK, "consumed_samples", None)
        context.CLOCK.consumed_samples = 0
        router = PoolRouter(configuration, pg_collection=get_default_pg_collection(), pool=pools)
        router.backend = lambda logits_TE: backend
        router.set_layer_number(1)
        router.train()
        for _ in range(2):
            bounds = torch.empty(NUM_DOCUMENTS + 1, dtype=torch.int32)
            packed = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                max_seqlen_q=SAMPLE,
                max_seqlen_kv=SAMPLE,
                tokens_per_sample=SAMPLE,
                cu_seqlens_q_padded=bounds if padded else None,
                cu_seqlens_kv_padded=bounds if padded else None,
            )
            if has_tails:
                setattr(
                    packed,
                    context.TRAILING_PADDING,
                    torch.empty(TOKENS // SAMPLE, dtype=torch.int64),
                )
            router.scope = context.scope_of(
                packed,
                hidden_shape=torch.Size([TOKENS // cp, 1, 32]),
                shard=shard,
                pool=pools,
                layer_number=1,
            )
            logits = torch.randn(TOKENS // cp, 1, EXPERTS, requires_grad=True)
            probs, routing_map = router.routing(logits)
            probs.sum().backward()
        assert logits.grad is not None
        return probs.device.type, tuple(probs.shape), tuple(routing_map.shape)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_routing_can_be_captured(ranks, backend):
    for name, case in CASES.items():
        got = ranks(1).run(_forward_and_backward, backend=backend, **case)[0]
        shape = (TOKENS // case.get("cp", 1), EXPERTS)
        assert got == ("meta", shape, shape), name


def test_a_value_that_is_looked_at_is_found(ranks):
    with pytest.raises(RuntimeError, match="DataDependent"):
        ranks(1).run(_forward_and_backward, backend="reference", pool={"pool_check": True})
