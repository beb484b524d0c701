"""Every MoE pretraining recipe on text of Bridge with pools, and two steps of one recipe of each family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "bridge-recipes.json"
MAY_CHANGE = {
    "model.moe_router_dtype",
    "model.moe_router_force_load_balancing",
    "model.cuda_graph_impl",
    "model.cuda_graph_modules",
    "model.cuda_graph_scope",
    "model.enable_cuda_graph",
    "model.external_cuda_graph",
}
"""Options that apply_pools may change in any recipe."""

MUST_TRAIN = {
    "OLMoE",
    "Qwen3 30B-A3B",
    "Qwen3 235B-A22B",
    "DeepSeek V2",
    "Kimi K2",
    "Moonlight",
    "gpt-oss",
    "EXAONE",
    "MiniMax-M3",
    "DeepSeek V3",
    "GLM 4.5, 5",
    "Step-3.5",
}
LASTING = {
    "DeepSeek V4": "model.enable_hyper_connections",
    "Nemotron 3 Super, Ultra": "model.moe_expert_capacity_factor",
}
"""Family -> the option for which recipes of it are refused: Megatron-Core does not have it, or drops tokens by it."""


@pytest.fixture(scope="module")
def found(run_bridge):
    printed = run_bridge(ROOT / "tests" / "bridge" / "recipe_coverage.py")
    (line,) = (line for line in printed.splitlines() if line.startswith('{"recipes"'))
    return json.loads(line)


@pytest.fixture(scope="module")
def stored():
    return json.loads(RESULTS.read_text())


def _without_sentences(row):
    """Of a reason the option that it names."""
    return row | {"reason": [reason.split()[0] for reason in row.get("reason") or ()]}


def test_verdicts_are_the_stored_ones(found, stored):
    """python tests/bridge/recipe_coverage.py --write stores new ones."""
    by_name = [{row["recipe"]: _without_sentences(row) for row in results["recipes"]} for results in (found, stored)]
    assert len(by_name[0]) == len(found["recipes"]) > 270
    changed = {
        name: [rows.get(name) for rows in by_name]
        for name in by_name[0].keys() | by_name[1].keys()
        if by_name[0].get(name) != by_name[1].get(name)
    }
    assert changed == {}
    for name in ("versions", "left_out", "not_called"):
        assert found[name] == stored[name], name


def test_every_recipe_that_bridge_can_build_can_have_pools(found):
    refused = [row for row in found["recipes"] if row["verdict"] == "refused"]
    assert {row["family"] for row in refused} == set(LASTING)
    for row in refused:
        assert row["reason"]
        assert all(row["reason"])
        assert LASTING[row["family"]] in " ".join(row["reason"]), row["recipe"]
    v4 = [row for row in found["recipes"] if row["family"] == "DeepSeek V4"]
    assert len([row for row in refused if row["family"] == "DeepSeek V4"]) == len(v4)
    assert sum(row["has_mtp"] for row in found["recipes"] if row["verdict"] != "refused") > 90


def test_only_what_pools_need_is_changed_and_all_of_it_is_told(found):
    accepted = [row for row in found["recipes"] if row["verdict"] != "refused"]
    assert {name for row in accepted for name in row["changed"]} <= MAY_CHANGE
    assert {row["recipe"]: row["untold"] for row in accepted if row["untold"]} == {}
    # what Bridge's own check of the model says is what it says of the stock recipe
    assert {row["recipe"]: row["stopped"] for row in accepted if row["stopped"]} == {}


def test_a_recipes_own_layers_hold_pools(found):
    missing = {
        row["family"]: row["layers"]
        for row in found["recipes"]
        if row["verdict"] != "refused" and row["layers"] != "built"
    }
    # Megatron builds experimental attention and latent experts of Transformer Engine's modules
    needing = {"Qwen3.5", "Qwen3-Next", "GLM 4.5, 5", "Nemotron 3 Super, Ultra"}
    assert set(missing) <= needing
    assert all("transformer engine" in error.lower() for error in missing.values())


def test_a_recipe_of_each_family_trains_two_steps(found, stored):
    families = found["families"]
    assert {row["family"] for row in found["recipes"]} == set(families)
    assert {name for name, result in families.items() if "losses" in result} >= MUST_TRAIN
    for family, result in families.items():
        for trained in [result.get("without_mamba"), result if "losses" in result else None]:
            if trained is None:
                continue
            first, second = trained["losses"]
            assert 0 < second < first < 10, family
            # at least 4 of 16 experts: pools were at work
            assert len(trained["pool_sizes"]) == 2, family
            assert all(4 <= size < 16 for size in trained["pool_sizes"]), family
        if "error" in result:
            # no fault of pools: the recipe as it comes fails in the same words
            assert result["error"] == result["stock"]["error"], family
        # where more is installed, more trains
        for name in {"recipe", "left_out", "error"} & result.keys():
            was = stored["families"][family]
            assert result[name] == was.get(name) or "error" in was.keys() - result.keys(), family


def test_steps_that_bridge_runs_again_draw_the_same_pools_and_count_once(found):
    """Where moe_expert_rank_capacity_factor was too small; an expert bias is among what counts."""
    want, again = found["families"]["Moonlight"], found["over_budget"]
    for name in ("losses", "pool_sizes"):
        assert again[name] == pytest.approx(want[name], rel=1e-5), name
    # 2 steps of 4 micro-batches, twice
    assert again["runs"] == 16
