"""Choosing experts: the best by score, at random, and how many a fraction is."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.modules.select import num_kept, select_random, select_top


def test_the_best_are_kept_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert select_top(scores, keep=2).tolist() == [
        [False, True, False, True],
        [True, True, False, False],
    ]


def test_random_choices_are_seeded_and_differ_by_layer():
    masks = select_random(num_layers=6, num_experts=32, keep=8, seed=3)
    assert masks.sum(-1).tolist() == [8] * 6
    assert torch.equal(masks, select_random(num_layers=6, num_experts=32, keep=8, seed=3))
    assert not torch.equal(masks, select_random(num_layers=6, num_experts=32, keep=8, seed=4))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 32), (0.25, 8), (0.0625, 2), (0.001, 1)])
def test_a_fraction_is_a_number_of_experts(fraction, kept):
    assert num_kept(fraction, num_experts=32) == kept


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="must lie in"):
        num_kept(fraction, num_experts=32)
