"""The deduplicating dispatcher computes what Megatron's alltoall computes, and sends each token to a rank once."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mcore.test_metrics import Operations
from support import shards, tiny

from emo_megatron import ops
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.combinations import problems_with_config

TOLERANCE = 1e-6
"""Of a tensor's norm; float32."""
LAYOUTS = {
    "one rank": {},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2 + SP, EP2": {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "ETP2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "EP4": {"expert_model_parallel_size": 4},
    "EP2 x ETP2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}
WORLD = {"one rank": 1, "EP2": 2, "TP2 + SP, EP2": 2, "ETP2": 2, "EP4": 4, "EP2 x ETP2": 4}
SLOW = pytest.mark.slow
"""Four processes take a while to start; the parity table has such layouts too."""


def _deviation(got, want):
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def _run(layer, hidden):
    """Output and gradients by name."""
    tokens = hidden.clone().requires_grad_()
    output, _ = layer(tokens)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * weights).sum().backward()
    found = {"output": output.detach(), "tokens": tokens.grad}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=True)
    return found


def _compare(sizes, dtype="float32", top_k=4, **overrides):
    """Largest deviations of one MoE layer's outputs and gradients, and rows of both dispatchers."""
    tiny.setup(**sizes)
    torch.manual_seed(0)
    layers = {}
    for name in ("megatron", "dedup"):
        layers[name] = _layer(name, top_k, dtype, overrides)
        shards.initialise([layers[name]], seed=3)
    hidden = torch.randn(13, 2, 32, generator=torch.Generator().manual_seed(torch.distributed.get_rank())).to(
        getattr(torch, dtype)
    )
    sent = {}
    answers = {}
    maps = []
    layers["dedup"].router.register_forward_hook(lambda *args: maps.append(args[2][1].bool()))
    for name, layer in layers.items():
        with _counting(sent.setdefault(name, [])):
            answers[name] = _run(layer, hidden)
    assert answers["megatron"].keys() == answers["dedup"].keys()
    rows = {name: sum(tensors[:1]) for name, tensors in sent.items()}
    deviations = {k: _deviation(answers["dedup"][k].float(), want.float()) for k, want in answers["megatron"].items()}
    ranks = sizes.get("expert_model_parallel_size", 1)
    wanted = maps[0].view(len(maps[0]), ranks, -1).any(-1).sum().item()
    return {"deviations": deviations, "rows": rows, "wanted": wanted, "tokens": len(maps[0])}


def _layer(dispatcher, top_k, dtype, overrides):
    model = tiny.model(
        PoolConfig(pool_dispatcher=dispatcher),
        moe_router_topk=top_k,
        params_dtype=getattr(torch, dtype),
        bf16=dtype == "bfloat16",
        moe_aux_loss_coeff=0.0,
        moe_z_loss_coeff=None,
        moe_router_load_balancing_type="none",
        **overrides,
    )
    return model.decoder.layers[0].mlp.to(getattr(torch, dtype))


@contextlib.contextmanager
def _counting(rows):
    """Notes the rows of every all-to-all of hidden states."""
    original = torch.distributed.all_to_all_single

    def counted(output, input, *args, **kwargs):
        if input.dim() == 2:
            rows.append(input.shape[0])
        return original(output, input, *args, **kwargs)

    with mock.patch.object(torch.distributed, "all_to_all_single", counted):
        yield


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if WORLD[n] > 2 else ()) for n in LAYOUTS])
def test_computes_what_alltoall_computes(name, ranks):
    for answer in ranks(WORLD[name]).run(_compare, sizes=LAYOUTS[name]):
        assert len(answer["deviations"]) > 3
        assert {k: v for k, v in answer["deviations"].items() if not v < TOLERANCE} == {}


def test_sends_a_token_to_a_rank_once(ranks):
    for answer in ranks(2).run(_compare, sizes=LAYOUTS["EP2"], top_k=2):
        tokens, rows = answer["tokens"], answer["rows"]
        assert rows["megatron"] == 2 * tokens
        assert rows["dedup"] == answer["wanted"]
        # not every token has experts on both ranks, or sending all of them twice would pass
        assert tokens < answer["wanted"] < 2 * tokens


def test_bf16_is_as_near_as_its_rounding(ranks):
    for answer in ranks(2).run(_compare, sizes=LAYOUTS["EP2"], dtype="bfloat16"):
        assert max(answer["deviations"].values()) < 2**-7


def test_experts_of_one_rank_only(ranks):
    # a rank that gets nothing, and one that sends everything to one peer
    for answer in ranks(2).run(_one_sided):
        assert answer < TOLERANCE


def _one_sided():
    tiny.setup(expert_model_parallel_size=2)
    outputs = []
    for name in ("megatron", "dedup"):
        layer = _layer(name, 2, "float32", {})
        shards.initialise([layer], seed=3)
        layer.router.allowed_experts = torch.arange(8) < 4
        outputs.append(_run(layer, torch.randn(5, 1, 32, generator=torch.Generator().manual_seed(1))))
    return max(_deviation(outputs[1][key], want) for key, want in outputs[0].items())


def _padded(dispatcher, *, pads):
    """Output and gradients, and the tokens of each expert here, with every expert's filled up to 16."""
    tiny.setup(expert_model_parallel_size=2)
    layer = _layer(dispatcher, 2, "float32", {})
    shards.initialise([layer], seed=3)
    if not ops.why_not_native("cpu"):
        # as with pools: the compiled op's backward reads the map it gave
        layer.router.backend = lambda _: "native"
    if pads:
        # Megatron's CPU backend has no fp8 arithmetic, so only router and dispatcher are told of it
        layer.config.moe_router_padding_for_quantization = True
        layer.token_dispatcher.config = copy.copy(layer.config)
        layer.token_dispatcher.config.fp8 = "e4m3"
    tokens = []
    postprocess = layer.token_dispatcher.dispatch_postprocess
    layer.token_dispatcher.dispatch_postprocess = lambda *args: _noted(tokens, postprocess(*args))
    seed = torch.distributed.get_rank()
    hidden = torch.randn(25, 2, 32, generator=torch.Generator().manual_seed(seed))
    operations = Operations()
    with operations:
        answers = _run(layer, hidden)
    return answers, tokens[0], operations.count


def _noted(tokens, dispatched):
    tokens.append(dispatched[1].tolist())
    return dispatched


@pytest.mark.parametrize("dispatcher", ["megatron", "dedup"])
def test_padding_for_quantisation_changes_nothing_but_the_rows(once, dispatcher):
    wanted, padded = (once(2, _padded, dispatcher=dispatcher, pads=pads) for pads in (False, True))
    assert any(n % 16 for _, tokens, _ in wanted for n in tokens)
    for (want, before, _), (found, after, _) in zip(wanted, padded, strict=True):
        assert all(n % 16 == 0 and n >= m for n, m in zip(after, before, strict=True))
        assert want.keys() == found.keys()
        assert {k: d for k in want if not (d := _deviation(found[k], want[k])) < TOLERANCE} == {}


@pytest.mark.skipif(bool(ops.why_not_native("cpu")), reason="the compiled ops are not built")
@pytest.mark.parametrize("pads", [False, True])
def test_starts_no_more_operations_than_alltoall(once, pads):
    counts = [once(2, _padded, dispatcher=dispatcher, pads=pads)[0][2] for dispatcher in ("dedup", "megatron")]
    assert counts[0] <= counts[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_token_dispatcher_type", "allgather"),
        ("moe_shared_expert_overlap", True),
        ("moe_expert_rank_capacity_factor", 2.0),
        ("overlap_dispatch_backward_with_experts_wgrad", True),
    ],
)
def test_refuses_what_it_cannot_do(option, value):
    def problems(dispatcher):
        config = SimpleNamespace(num_moe_experts=8, moe_router_topk=2, **{option: value})
        return problems_with_config(PoolConfig(pool_dispatcher=dispatcher), config)

    assert problems("megatron") == []
    (problem,) = problems("dedup")
    assert option.replace("_", "-") in problem
    assert "must " in problem
