"""Experts that work on a latent smaller than the hidden size: the router sees all of it, and pools are as ever.

Transformer Engine, which has the projections, is stood in for by plain linear layers.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from support import tiny

from emo_megatron.config import PoolConfig

LATENT = 12


class Linear(torch.nn.Linear):
    """As Transformer Engine's of the same name, duplicated over tensor-parallel ranks."""

    def __init__(self, features, outputs, *, parallel_mode, config, init_method, bias, **_):
        assert parallel_mode == "duplicated"
        super().__init__(features, outputs, bias=bias)
        init_method(self.weight)

    def forward(self, x):
        return super().forward(x), None


@contextlib.contextmanager
def _transformer_engine():
    from megatron.core.transformer.moe import moe_layer

    with mock.patch.multiple(moe_layer, HAVE_TE=True, TELinear=Linear):
        yield


def _train(pool):
    tiny.setup()
    with _transformer_engine():
        model = tiny.model(pool, moe_latent_size=LATENT)
    params = tiny.packed([0, 5, 16, 32])
    model(**tiny.batch(0), attention_mask=None, packed_seq_params=params).mean().backward()
    layer = model.decoder.layers[0].mlp
    pools = params.emo_scope.pools[1]
    expert = layer.experts.local_experts[0]
    return {
        "pools": pools,
        "router": layer.router.weight.grad,
        "down": layer.fc1_latent_proj.weight.grad,
        "expert": tuple(expert.linear_fc1.weight.shape),
        "used": layer.router.weight.grad.abs().sum(-1) > 0,
    }


@pytest.mark.parametrize("dispatcher", ["megatron", "dedup"])
def test_pools_with_latent_experts(ranks, dispatcher):
    seen = ranks(1).run(_train, pool=PoolConfig(pool_min=3, pool_max=3, pool_dispatcher=dispatcher))[0]
    assert seen["expert"][1] == LATENT
    assert seen["router"].shape[1] == 32
    assert seen["pools"].sum(-1).tolist() == [3, 3, 3]
    assert torch.equal(seen["used"], seen["pools"].any(0))
    assert seen["down"].abs().sum() > 0
