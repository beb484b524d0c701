"""docs/bridge.md keeps its word: its commands reach the recipe, its Python runs, its findings print what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "bridge.md").read_text()
RESULTS = ROOT / "benchmarks" / "results" / "bridge-recipes.json"


@pytest.fixture(scope="module")
def page(run_bridge, tmp_path_factory):
    printed = run_bridge("-m", "support.bridge_page", tmp_path_factory.mktemp("page"))
    (seen,) = (line for line in printed.splitlines() if line.startswith('{"blocks"'))
    return json.loads(seen)


def test_its_findings_are_what_bridge_does(page):
    findings = [block for block in page["blocks"] if block["page"]]
    assert len(findings) == 6
    for block in findings:
        assert block["printed"] == block["page"]


def test_its_three_lines_train_a_model_with_pools(page):
    assert page["trained"] == ["PoolOlMoEModelProvider"]


def test_its_export_is_of_the_trained_model(page):
    assert page["exported"] == [
        ["exported/emo", "runs/tuned", "runs/tuned-hf"],
        ["allenai/OLMoE-1B-7B-0125", "runs/olmoe", "runs/olmoe-hf"],
    ]


def test_its_stock_file_has_no_pools(page):
    ours, stock = (
        yaml.safe_load(page["files"][name])["model"] for name in ("run_config.yaml", "stock_run_config.yaml")
    )
    assert ours["pool_min"] == 8
    assert ours["_target_"].startswith("emo_megatron.")
    assert stock["_target_"].startswith("megatron.bridge.")
    assert not [name for name in stock if name.startswith("pool_")]
    assert stock["num_moe_experts"] == ours["num_moe_experts"]
    data = yaml.safe_load(page["files"]["stock_run_config.yaml"])["dataset"]
    assert data["inter_document_masking"] is False


def test_its_commands_reach_the_recipe(page):
    *lines, readme = page["lines"]
    first, second, listing, example = lines
    assert [line["script"] for line in lines] == [*["emo_megatron"] * 3, "examples/bridge_recipe.py"]
    assert first["pool_min"] == second["pool_min"] == 8
    assert first["recipe"].startswith("olmoe_7b_pretrain")
    assert (first["steps"], first["save"], first["data"]) == (100, "runs/olmoe", "data/web_text_document")
    assert first["load"] == first["save"]
    assert first["balance"] == ["global_aux_loss", 0.00625]
    assert second["recipe"].startswith("qwen3_30b_a3b_pretrain")
    assert listing["status"] == 0
    assert listing["lines"] > 100
    assert example["model"] == "allenai/OLMoE-1B-7B-0125"
    assert example["pool_min"] == 16
    assert readme["pool_min"] == 8
    assert readme["data"] == "data/web_text_document"
    assert readme["balance"] == ["global_aux_loss", 0.00625]


def test_its_table_has_every_option_that_is_changed():
    source = (ROOT / "emo_megatron" / "bridge" / "recipe.py").read_text()
    changed = set(re.findall(r'"((?:dataset|model)\.\w+)": ', source))
    assert len(changed) >= 5
    told = re.findall(r"^\| (`(?:dataset|model)\..*?) \|", PAGE, flags=re.MULTILINE)
    assert changed <= set(re.findall(r"`(.*?)`", " ".join(told)))


def test_it_counts_the_names_of_recipes(page):
    names = int(re.search(r"on text: (\d+) names", PAGE)[1])
    assert page["lines"][2]["lines"] == names
    recipes = [r["recipe"] for r in json.loads(RESULTS.read_text())["recipes"]]
    different = len({name.rpartition(".")[2] for name in recipes})
    assert f"have {different} different names, because {len(recipes) - different} names are in both" in PAGE
    assert f"{names - different} recipes have a second name" in PAGE


def test_its_table_of_families_counts_the_recipes():
    results = json.loads(RESULTS.read_text())
    counts = {family: [0, 0, 0, 0] for family in ("all", *(r["family"] for r in results["recipes"]))}
    for row in results["recipes"]:
        for family in ("all", row["family"]):
            counts[family][0] += 1
            counts[family][1 + ("unchanged", "started", "refused").index(row["verdict"])] += 1
    for family, numbers in counts.items():
        assert f"| {family} | {' | '.join(map(str, numbers))} |" in PAGE, family


def test_its_links_lead_somewhere():
    # the folder of results is written by their scripts
    for path in re.findall(r"\]\(((?!http|\.\./benchmarks/results)[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
