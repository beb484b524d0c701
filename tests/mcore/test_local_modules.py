"""What Megatron's local spec lacks beside attention: norms of uncompressed latent queries, biases of experts."""

from __future__ import annotations

import pytest
import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from support import shards, tiny, training
from support.training import Case

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.local import NormedLinear

UNCOMPRESSED = {"multi_latent_attention": True, "q_lora_rank": None}
BIASES = {"add_bias_linear": True, "moe_shared_expert_intermediate_size": None}


def _projection(normalization):
    tiny.setup()
    config = tiny.transformer_config(normalization=normalization)
    linear = NormedLinear(32, 8, config=config, init_method=config.init_method, bias=False)
    assert isinstance(linear, ColumnParallelLinear)
    norms = dict(linear.named_parameters())
    weight = norms.pop("weight")
    x = torch.randn(5, 32)
    with torch.no_grad():
        for parameter in norms.values():
            parameter.normal_()
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    wanted = scaled * norms["layer_norm_weight"] + norms.get("layer_norm_bias", 0)
    return sorted(norms), linear(x)[0].detach(), (wanted @ weight.T).detach()


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_normed_projection_is_a_norm_and_a_product(ranks, normalization):
    names, found, wanted = ranks(1).run(_projection, normalization=normalization)[0]
    has_bias = normalization == "LayerNorm"
    assert names == ["layer_norm_bias"] * has_bias + ["layer_norm_weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _experts():
    tiny.setup()
    layer = tiny.model(PoolConfig(pool_min=3), **BIASES).decoder.layers[0].mlp
    expert = layer.experts.local_experts[0]
    assert isinstance(expert, MLP)
    assert get_tensor_model_parallel_group().size() == 1
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.normal_()
    x, weight_T = torch.randn(5, 32), torch.rand(5)
    found, bias = expert(x, weight_T)
    gate, up = (x @ expert.linear_fc1.weight.T + expert.linear_fc1.bias).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    wanted = (hidden @ expert.linear_fc2.weight.T + expert.linear_fc2.bias) * weight_T[:, None]
    assert bias is None
    leaves = list(expert.parameters())
    return [[out.detach(), *torch.autograd.grad(out.sum(), leaves)] for out in (found, wanted)]


def test_an_expert_with_biases_weights_them_as_its_output(ranks):
    found, wanted = ranks(1).run(_experts)[0]
    assert len(found) == 5
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "config", "name"),
    [({"tp": 2}, UNCOMPRESSED, "linear_q_proj.layer_norm_weight"), ({"ep": 2, "dp": 2}, BIASES, "linear_fc2.bias")],
    ids=["queries TP2+SP", "biases EP2"],
)
def test_two_ranks_train_the_model_of_one(ranks, layout, config, name):
    case = Case(name=name, mbs=2, per_token=True, config=config, **layout)
    (want,) = ranks(1).run(training.train, case=case.reference, seed=1)
    got = ranks(2).run(training.train, case=case, seed=1)
    for kind in ("gradients", "weights"):
        seen = shards.deviations(want[kind], [answer[kind] for answer in got])
        assert any(name in key for key in seen)
        assert {key: share for key, share in seen.items() if not share <= 1e-5} == {}
