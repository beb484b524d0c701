"""Choosing experts: by score, at random; and how many a size is."""

from __future__ import annotations

import pytest
import torch
from support import experts

from emo_megatron.experts.select import (
    METHODS,
    MaxLossIncrease,
    keep_for_budget,
    parse_keep,
    select_by_stats,
    select_random,
    select_top,
)
from emo_megatron.finite import NotFiniteError


def test_the_best_are_kept_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert select_top(scores, keep=2).tolist() == [[False, True, False, True], [True, True, False, False]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_rank_nothing(value):
    scores = torch.rand(3, 8)
    scores[1, 6] = value
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(NotFiniteError, match=f"expert 6 has {value} in row 2 of 3"):
            select_top(scores.to(dtype), keep=2)


def test_random_choices_are_seeded_and_differ_by_layer():
    masks = select_random(num_layers=6, num_experts=32, keep=8, seed=3)
    assert masks.sum(-1).tolist() == [8] * 6
    assert torch.equal(masks, select_random(num_layers=6, num_experts=32, keep=8, seed=3))
    assert not torch.equal(masks, select_random(num_layers=6, num_experts=32, keep=8, seed=4))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("text", "routed"),
    [
        *(("127 routed", 127), ("16 routed", 16), ("12.5%", 16), ("25%", 32), ("100%", 127), ("7 routed", 7)),
        *((" 5.7 % ", 7), (" 8  routed ", 8)),
    ],
)
def test_sizes_count_routed_experts(text, routed):
    assert parse_keep(text, num_experts=127, top_k=7) == routed


@pytest.mark.parametrize(
    "text",
    ["6 routed", "128 routed", "5%", "101%", "-3 routed", "nan%", "inf%", "half", "", "routed", "8 experts", "8.0"],
)
def test_a_size_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="--keep must"):
        parse_keep(text, num_experts=127, top_k=7)


@pytest.mark.parametrize("text", ["0", "1", "9" * 5000, "-8"])
def test_a_number_that_no_release_took_is_refused_without_a_hint(text):
    with pytest.raises(ValueError, match=r"^--keep must (?!.*shared)"):
        parse_keep(text, num_experts=127, top_k=7)


@pytest.mark.parametrize("text", ["8", " 16 ", "127"])
def test_a_bare_number_says_what_earlier_releases_counted(text):
    with pytest.raises(ValueError, match=r"--keep must .*shared"):
        parse_keep(text, num_experts=127, top_k=7)


def test_a_budget_is_used_up_and_not_exceeded():
    # 3 layers of 1,000 parameters an expert, 50,000 elsewhere, 2 bytes each: 106 kB for one expert a layer
    metadata = experts.METADATA
    assert keep_for_budget(0.112, metadata, bytes_per_parameter=2) == 2
    assert keep_for_budget(0.1179, metadata, bytes_per_parameter=2) == 2
    assert keep_for_budget(0.118, metadata, bytes_per_parameter=2) == 3
    assert keep_for_budget(0.236, metadata, bytes_per_parameter=4) == 3
    assert keep_for_budget(50, metadata, bytes_per_parameter=2) == 8
    with pytest.raises(ValueError, match=r"--budget-mb must be 0\.1 or more.*got 0\.05"):
        keep_for_budget(0.05, metadata, bytes_per_parameter=2)
    # numbers that are finite and whose products are not
    assert keep_for_budget(1e308, metadata, bytes_per_parameter=2) == 8
    with pytest.raises(ValueError, match="--budget-mb must"):
        keep_for_budget(1e308, metadata, bytes_per_parameter=1e308)


def test_every_method_ranks_by_its_own_score():
    stats = experts.statistics()
    best = {m: select_by_stats(stats, method=m, keep=1)[0].nonzero().tolist() for m in METHODS if METHODS[m].scores}
    # of the first layer of the made-up model: more used, the higher; longer outputs, the lower
    assert best == {"mean_prob": [[7]], "frequency": [[7]], "easy_ep": [[0]], "reap": [[0]]}


@pytest.mark.parametrize(("text", "full", "highest"), [("0.05", 2.0, 2.05), ("1%", 2.0, 2.02), ("0", 3.0, 3.0)])
def test_a_bound_is_nats_or_a_share(text, full, highest):
    assert MaxLossIncrease.parse(text).highest(full) == pytest.approx(highest)


@pytest.mark.parametrize("text", ["", "-1%", "a bit", "nan", "nan%", "inf", "-inf%", "1e999%"])
def test_a_bound_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--max-loss-increase must"):
        MaxLossIncrease.parse(text)
