"""Statistics and loss of a Megatron model: the same under every layout, and what the definitions say."""

from __future__ import annotations

import functools

import pytest
import torch
from support import studies

LAYOUTS = {
    "dp2": {"world": 2},
    "ep2": {"world": 2, "expert_model_parallel_size": 2},
    "tp2": {"world": 2, "tensor_model_parallel_size": 2},
    "pp2": {"world": 2, "pipeline_model_parallel_size": 2},
    "tp2-ep2-pp2": {
        "world": 4,
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
    },
    "dp2-ep4": {"world": 4, "expert_model_parallel_size": 4},
}
KEPT = [[True, False, True, True, False, False, True, False]] * 3


@functools.cache
def _single(ranks, **options):
    return ranks(1).run(studies.measure, layout={}, **options)[0]


@pytest.fixture
def single(ranks):
    return functools.partial(_single, ranks)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in ("count_LE", "together_LEE", "num_tokens", "tokens"):
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name])), name
    for name in want.keys() - {"count_LE", "together_LEE"}:
        torch.testing.assert_close(
            torch.as_tensor(got[name]), torch.as_tensor(want[name]), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_measures_what_one_process_does(ranks, single, layout):
    world = layout["world"]
    sizes = {name: size for name, size in layout.items() if name != "world"}
    for answer in ranks(world).run(studies.measure, layout=sizes):
        assert_same(answer, single())
