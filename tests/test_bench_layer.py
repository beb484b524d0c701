"""The gate of the layer benchmark: near ties pass it, anything else that differs does not; and the sizes of others."""

from __future__ import annotations

import pytest
import torch
from support.benchmarking import BENCHMARKS, answer_of

GATE = """
import dataclasses
from unittest import mock
import routers
routers.CLEAR_GAP, routers.NUM_SPARE = 2e-3, 0.2
import torch
import bench_layer
import layer_check
from layer_check import check_experts, check_routing
from layers import LayerSize, build_layers
from emo_megatron import ops
from emo_megatron.ops.native import NativeOps

size = LayerSize(tokens=512, model_dim=64, experts=8, ffn_dim=16, top_k=2, documents=4)
sequential, grouped = build_layers(size, device=torch.device("cpu"))
experts = type(grouped.layers[bench_layer.STOCK].experts)
real_topk, real_ops_topk, real_experts = NativeOps.pool_topk, ops.pool_topk, experts.forward
swapped = []

def swap_near_ties(self, logits_TE, *, document_ids_T, pool_DE, top_k, gap=2e-3, **options):
    # routes a token to the next expert where it is as good as the last
    in_pool_TE = logits_TE.masked_fill(~pool_DE[document_ids_T], float("-inf"))
    values, order = in_pool_TE.topk(top_k + 1)
    is_near_T1 = (values[:, -2:-1] - values[:, -1:]) < gap
    swapped.append(int(is_near_T1.sum()))
    places_TE = torch.arange(logits_TE.shape[1]).expand_as(order.new_empty(logits_TE.shape))
    other_TE = places_TE.scatter(1, order[:, -2:], order[:, -2:].flip(1))
    places_TE = torch.where(is_near_T1, other_TE, places_TE)
    return real_topk(
        self, logits_TE.gather(1, places_TE), document_ids_T=document_ids_T, pool_DE=pool_DE, top_k=top_k, **options
    )

def swap_more(self, logits_TE, **options):
    return swap_near_ties(self, logits_TE, gap=2e-2, **options)

def forget_pools(logits_TE, *, pool_DE, **options):
    return real_ops_topk(logits_TE, pool_DE=torch.ones_like(pool_DE), **options)

def scale_in_pools(self, logits_TE, *, pool_DE, **options):
    # right where no pool binds, and differs from the reference only then
    routing = real_topk(self, logits_TE, pool_DE=pool_DE, **options)
    return dataclasses.replace(routing, probs_TE=routing.probs_TE * (1.0 if pool_DE.all() else 1.01))

def scale(self, *args):
    output, bias = real_experts(self, *args)
    return 1.01 * output, bias

def cannot(self, *args):
    raise RuntimeError("no grouped_mm here\\nand more")

def verdict(target, name, broken, check):
    with mock.patch.object(target, name, broken):
        try:
            return check() or ""
        except ValueError as error:
            return str(error)

routing = lambda: check_routing(sequential)

def loosely():
    # tokens that are left out still count in the balance loss, which 500 tokens show
    with mock.patch.object(layer_check, "_tolerance", lambda layers: 1e-2):
        routing()

kinds = [sequential, grouped]
answer({
    "as it is": verdict(NativeOps, "pool_topk", real_topk, routing),
    "near ties": verdict(NativeOps, "pool_topk", swap_near_ties, loosely),
    "swapped": max(swapped),
    "beyond": verdict(NativeOps, "pool_topk", swap_more, loosely),
    "no pools": verdict(ops, "pool_topk", forget_pools, routing),
    "scaled": verdict(NativeOps, "pool_topk", scale_in_pools, routing),
    "no spare": verdict(layer_check, "NUM_SPARE", 0.0, routing),
    "experts": verdict(experts, "forward", scale, lambda: check_experts(grouped, sequential)),
    "right experts": verdict(experts, "forward", real_experts, lambda: check_experts(grouped, sequential)),
    "cannot": verdict(experts, "forward", cannot, lambda: bench_layer._check(kinds)),
    "kinds": len(kinds),
})
"""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_only_near_ties_pass_the_gate():
    from emo_megatron import ops

    if reason := ops.why_not_native("cpu"):
        pytest.skip(f"the reference is compared with the compiled ops: {reason}")
    found = answer_of(GATE)
    assert found["as it is"] == found["near ties"] == ""
    assert found["swapped"] > 0
    assert "output" in found["beyond"]
    assert "leave the pool" in found["no pools"]
    assert "reference" in found["scaled"]
    assert "near ties" in found["no spare"]
    assert found["right experts"] == ""
    assert "output" in found["experts"]
    assert found["cannot"] == {"torch.nn.functional.grouped_mm": "no grouped_mm here"}
    assert found["kinds"] == 1


@pytest.mark.parametrize(("other_expert", "is_refused"), [(1, False), (2, True)])
def test_a_pool_may_differ_by_experts_that_score_the_same(other_expert, is_refused):
    from layer_check import _settled_documents

    logits_TE = torch.tensor([[0.0, 0.0, -1.0], [2.0, 2.0 + 1e-7, 1.0]]).repeat(4, 1)
    ids_T = torch.tensor([0, 1]).repeat(4)
    pool_DE = torch.tensor([[True, False, False], [True, False, False]])
    other_DE = pool_DE.clone()
    other_DE[1] = torch.arange(3) == other_expert
    if is_refused:
        with pytest.raises(ValueError, match="pool for document 1"):
            _settled_documents(logits_TE, ids_T, pool_DE, other_DE)
    else:
        assert _settled_documents(logits_TE, ids_T, pool_DE, other_DE).tolist() == [True, False]


def test_few_documents_may_differ():
    from layer_check import _settled_documents

    logits_TE = torch.zeros(4, 2)
    pool_DE = torch.tensor([[True, False]]).repeat(4, 1)
    with pytest.raises(ValueError, match="4 of 4 documents have a near tie"):
        _settled_documents(logits_TE, torch.arange(4), pool_DE, ~pool_DE)


def test_bytes_of_the_permutation_are_those_of_its_tensors():
    from bench_permute import Options, Size

    assert len(list(Options().sizes())) == 32
    with pytest.raises(ValueError, match="--width"):
        Options(width=(0,))
    size = Size(tokens=10, experts=4, top_k=2, width=8, dtype="bfloat16")
    # rows in and out each way, the map, and the weights of 20 pairs
    forward = 2 * (10 + 20) * 8 * 2 + 10 * 4 + 2 * 20 * 4
    assert size.bytes_moved("forward") == forward
    assert size.bytes_moved("total") == forward + 2 * (10 + 20) * 8 * 2 + 20 * 4 + 10 * 4 * 4
