"""Placement: planted groups are found, load stays within its bound, no swap is left that helps, files come back."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from support import experts

from emo_megatron.cli import main
from emo_megatron.experts.placement import load_placement, pack_by_load, place, place_by_coactivation
from emo_megatron.experts.stats import ExpertStatistics


def _routing(num_tokens=2000, num_experts=16, num_groups=4, top_k=3, stray=0.1, seed=0):
    """Tokens that use experts of one hidden group, now and then another; the group of every expert."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.arange(num_experts) % num_groups)
    routing = np.zeros((num_tokens, num_experts), bool)
    for token in range(num_tokens):
        weights = np.where(group == rng.integers(num_groups), 1.0, stray)
        chosen = rng.choice(num_experts, top_k, replace=False, p=weights / weights.sum())
        routing[token, chosen] = True
    return torch.tensor(routing), group


def _stats(*routings):
    together = torch.stack([(r.T.double() @ r.double()).long() for r in routings])
    layers = tuple(range(2, 2 + len(routings)))
    metadata = dataclasses.replace(experts.METADATA, num_experts=together.shape[1], top_k=3, layers=layers)
    return ExpertStatistics(
        model=metadata,
        num_documents=1,
        num_tokens=len(routings[0]),
        probability_LE=torch.zeros(together.shape[:2], dtype=torch.float64),
        count_LE=together.diagonal(dim1=1, dim2=2).contiguous(),
        coactivation_LEE=together,
    )


def test_planted_groups_are_found():
    routing, group = _routing()
    placement = place(_stats(routing, routing), num_ranks=4)
    assert placement.layers == (2, 3)
    for order in placement.order:
        for rank in range(4):
            assert len({group[e] for e in order[rank * 4 : rank * 4 + 4]}) == 1
    # ranks that hold any of a token's experts
    before, after = (routing[:, list(order)].view(-1, 4, 4).any(-1).sum() for order in (range(16), placement.order[0]))
    assert after < 0.75 * before


@pytest.mark.parametrize("seed", range(5))
def test_no_swap_that_keeps_the_bound_would_help(seed):
    routing, _ = _routing(num_experts=12, num_groups=3, stray=0.3, seed=seed)
    together = _stats(routing).coactivation_LEE[0].double().numpy()
    bound = 1.05
    rank = place_by_coactivation(together, num_ranks=3, max_imbalance=bound, seed=0)
    load = together.diagonal()

    def worth(rank):
        off = together - np.diag(load)
        fullest = np.bincount(rank, weights=load).max() / (load.sum() / 3)
        return fullest, off[rank[:, None] == rank].sum()

    fullest, inside = worth(rank)
    assert np.bincount(rank).tolist() == [4, 4, 4]
    assert fullest <= bound
    for one, other in itertools.combinations(range(12), 2):
        swapped = rank.copy()
        swapped[[one, other]] = swapped[[other, one]]
        changed = worth(swapped)
        assert changed[0] > bound or changed[1] <= inside + 1e-3 * inside


def test_load_wins_over_togetherness():
    # experts 0 and 1 are always used together and carry almost everything: one rank could not bear both
    together = np.diag([100.0, 100.0, 10.0, 10.0])
    together[0, 1] = together[1, 0] = 100
    rank = place_by_coactivation(together, num_ranks=2, max_imbalance=1.1, seed=0)
    assert rank[0] != rank[1]
    rank = place_by_coactivation(together, num_ranks=2, max_imbalance=2.0, seed=0)
    assert rank[0] == rank[1]


@pytest.mark.parametrize("seed", range(20))
def test_a_bound_that_loads_do_not_allow_makes_no_rank_fuller(seed):
    rng = np.random.default_rng(seed)
    ranks, count = int(rng.integers(2, 5)), 12
    # a few experts carry most, so that no order is balanced
    together = rng.pareto(0.7, (count, count)).round(2) * 10
    together = np.triu(together, 1) + np.triu(together, 1).T
    load = together.sum(1) + rng.pareto(0.7, count).round(2) * 100
    together += np.diag(load)
    starts = (pack_by_load(load, num_ranks=ranks), np.arange(count) // (count // ranks))
    fullest = [np.bincount(start, weights=load).max() for start in starts]
    rank = place_by_coactivation(together, num_ranks=ranks, max_imbalance=1.0, seed=seed)
    assert np.bincount(rank).tolist() == [count // ranks] * ranks
    assert np.bincount(rank, weights=load).max() <= min(fullest) * (1 + 1e-9)


def test_packing_balances_loads_and_counts():
    rank = pack_by_load(np.array([8.0, 7.0, 1.0, 1.0, 1.0, 2.0]), num_ranks=2)
    assert np.bincount(rank).tolist() == [3, 3]
    assert np.bincount(rank, weights=[8, 7, 1, 1, 1, 2]).tolist() == [10, 10]


def test_the_file_comes_back(tmp_path):
    placement = place(_stats(_routing()[0]), num_ranks=2, method="load")
    assert load_placement(placement.save(tmp_path / "new" / "p.json")) == placement


def test_the_command_merges_statistics_and_writes_a_placement(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        _stats(_routing(seed=seed)[0]).of({"sha256": name}).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("a", "b")]
    command = ["place", "--stats", *files, "--output", str(tmp_path / "p.json"), "--ranks"]
    assert main([*command, "4"]) == 0
    merged = _stats(torch.cat([_routing(seed=seed)[0] for seed in (0, 1)]))
    assert load_placement(tmp_path / "p.json").order == place(merged, num_ranks=4).order
    assert main([*command, "2"]) == 2
    assert "p.json exists" in capsys.readouterr().err
    (tmp_path / "p.json").unlink()
    assert main([*command, "5"]) == 2
    assert "--ranks" in capsys.readouterr().err


def test_what_is_wrong_is_said(tmp_path):
    stats = _stats(_routing()[0])
    with pytest.raises(ValueError, match="--ranks"):
        place(stats, num_ranks=3)
    for bound in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--max-imbalance"):
            place(stats, num_ranks=2, max_imbalance=bound)
    placement = place(stats, num_ranks=2)
    with pytest.raises(ValueError, match="order"):
        dataclasses.replace(placement, order=((0,) * 16,))
    with pytest.raises(ValueError, match="another model"):
        placement.check_model("0" * 64, layers=(2,))
    path = placement.save(tmp_path / "p.json")
    path.write_text(path.read_text().replace("order", "x"))
    with pytest.raises(ValueError, match=r"p\.json"):
        load_placement(path)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_experts", ("16", 16.0, True, None, 0, -16, 10**15, 10**30)),
        ("num_ranks", ("2", 2.5, None, 0, -2, 3, 10**15)),
        ("layers", (1, None, "1", [1.0], ["1"], [None], [0], [2, 1], [[1]], {})),
        ("order", (1, None, [1], ["0123456789abcdef"], [[*range(15), "15"]], [[[0]] * 16], [{}])),
        ("model", (None, 1, [])),
        ("method", (None, {})),
        ("max_imbalance", ("1.1", None, [1.1])),
    ],
)
def test_a_field_of_another_type_is_refused_with_the_file(field, values, tmp_path):
    path = place(_stats(_routing()[0]), num_ranks=2).save(tmp_path / "p.json")
    stored = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(stored | {field: value}))
        with pytest.raises(ValueError, match=rf"p\.json.*({field.rstrip('s')}|do not divide)"):
            load_placement(path)
