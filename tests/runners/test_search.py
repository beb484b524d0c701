"""Choosing experts by running the model: layer by layer, and the smallest module within a bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import experts

from emo_megatron.experts.select import MaxLossIncrease, select_by_stats, select_random
from emo_megatron.runners.cache import CachedRunner, NoCache
from emo_megatron.runners.search import select_layerwise, smallest_within


def test_layerwise_measures_each_layer_with_the_earlier_ones_reduced():
    model = experts.MadeUpModel()
    mask = select_layerwise(CachedRunner(model, NoCache()), experts.documents(3), keep=2)
    assert mask.sum(-1).tolist() == [2, 2, 2]
    seen = [torch.tensor(allowed) for _, allowed in model.seen]
    assert len(seen) == 3
    for place, allowed in enumerate(seen):
        assert torch.equal(allowed[:place], mask[:place])
        assert allowed[place:].all()
    # and it is another choice than one pass makes
    one_pass = model.statistics(experts.documents(3).tokens, outputs=False)
    assert not torch.equal(mask, select_by_stats(one_pass, method="mean_prob", keep=2))


@pytest.mark.parametrize("smallest", range(2, 9))
def test_bisection_finds_the_smallest_module_within_the_bound(smallest):
    metadata = dataclasses.replace(experts.METADATA, top_k=2)
    model = experts.MadeUpModel(lambda kept: 2.0 if kept >= smallest else 3.0, metadata=metadata)
    chosen = []

    def choose(keep):
        chosen.append(keep)
        return select_random(num_layers=3, num_experts=8, keep=keep, seed=0)

    measured = CachedRunner(model, NoCache())
    mask, tried = smallest_within(measured, experts.documents(2), choose=choose, bound=MaxLossIncrease.parse("0.5"))
    assert mask.sum(-1).tolist() == [smallest] * 3
    assert tried == {keep: (2.0 if keep >= smallest else 3.0) for keep in sorted({*chosen, 8})}
    assert len(chosen) <= 3
