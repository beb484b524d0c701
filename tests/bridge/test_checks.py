"""What one process finds of recipes with pools (support/bridge_checks.py): bad input, run_config.yaml, weights' names.

What a recipe cannot have is one ValueError that names the field, before any process group exists. A run_config.yaml may
name our providers and nothing else of ours; our own readers call nothing in it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emo_megatron.config import PoolConfig

ROOT = Path(__file__).resolve().parents[2]

PROVIDERS = "emo_megatron.bridge.providers."
WANTED = {"pool_min": 3, "pool_unrestricted": 0.25, "pool_eval": 4, "pool_documents": "routers"}
NAMED = {
    "too large": ("model.pool_min", "100"),
    "below top-k": ("model.pool_min", "model.moe_router_topk"),
    "GPTSFTDatasetConfig": ("cfg.dataset", "GPTSFTDatasetConfig"),
    "MockVLMSFTDatasetConfig": ("cfg.dataset", "MockVLMSFTDatasetConfig"),
    "GPTFIMDatasetConfig": ("cfg.dataset", "GPTFIMDatasetConfig"),
    "packed": ("cfg.dataset", "GPTSFTDatasetConfig"),
    "reset_position_ids": ("dataset.reset_position_ids",),
    "reset_attention_mask": ("dataset.reset_attention_mask",),
    "own provider": ("cfg.model", "OwnProvider"),
    "capacity": ("model.moe_expert_capacity_factor",),
    # with attention that keeps to documents
    "mamba": ("model.pool_documents", "model.hybrid_layer_pattern"),
    "overlap": ("model.mtp_num_layers", "model.overlap_moe_expert_parallel_comm"),
    "uneven ranks": ("model.pool_documents", "model.moe_token_dispatcher_type"),
    "exchange": ("model.cp_comm_type",),
    "hybrid": ("model.hybrid_context_parallel",),
    "skipped": ("train.iterations_to_skip", "model.pipeline_model_parallel_size"),
    "strict": ("model.moe_router_force_load_balancing",),
    "no pools": ("cfg.model", "apply_pools"),
    # on the command line, after apply_pools
    "model.pool_min=100": ("model.pool_min", "100"),
    "model.pool_min=1": ("model.pool_min", "model.moe_router_topk"),
    "model.pool_min=3.5": ("model.pool_min", "3.5"),
    "model.pool_rule=gaussian": ("model.pool_rule", "gaussian"),
    "model.pool_documents=mlp": ("model.pool_documents", "mlp"),
    "model.moe_router_dtype=null": ("model.moe_router_dtype",),
    "model.moe_router_force_load_balancing=true": ("model.moe_router_force_load_balancing",),
}


@pytest.fixture(scope="module")
def checks_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def checks(run_bridge, checks_folder):
    run_bridge("-m", "support.bridge_checks", "all", checks_folder)
    return json.loads((checks_folder / "all.json").read_text())


@pytest.mark.parametrize("case", NAMED)
def test_a_wrong_recipe_is_one_error_before_process_groups(checks, case):
    tried = checks[case]
    assert tried["error"] == "ValueError"
    for name in NAMED[case]:
        assert name in tried["message"]
    # no flag of another host
    assert "--" not in tried["message"]
    assert not tried["groups"]


def test_an_unknown_field_is_named(checks):
    tried = checks["model.pool_mni=3"]
    assert tried["error"] == "OverridesError"
    assert "model.pool_mni" in tried["message"]
    assert not tried["groups"]


@pytest.mark.parametrize("case", ["strict", "too large", "capacity"])
def test_a_refused_recipe_is_left_as_it_was(checks, case):
    assert checks[case]["is_unchanged"]


@pytest.mark.parametrize("version", [None, "0.5.0"])
def test_without_a_supported_bridge_the_import_says_what_to_install(tmp_path, version):
    if version:
        metadata = tmp_path / f"megatron_bridge-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: megatron-bridge\nVersion: {version}\n")
    done = subprocess.run(
        [sys.executable, "-c", "import emo_megatron.bridge"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("ImportError")
    assert "megatron-bridge >=0.6, <0.7" in error
    assert (version or "docs/bridge.md") in error


def pools(**fields):
    return dataclasses.asdict(PoolConfig(**fields))


def test_a_run_config_gives_provider_pools_and_spec_back(checks):
    assert checks["model"] == "PoolOlMoEModelProvider"
    assert checks["has recipe's spec"]
    assert checks["pool"] == checks["stored"] == pools(**WANTED)
    assert checks["by hand"] == 3


def test_fields_are_overridden_by_hydra(checks):
    wanted = {"pool_max": 5, "pool_unrestricted": 0.1, "pool_mask": "selection"}
    assert checks["overridden"] == pools(pool_min=2, pool_documents="routers", **wanted)


def test_only_providers_may_be_instantiated(checks):
    kinds = ("ExaoneMoe", "GPT", "Hybrid", "MLA", "MiniMaxM3", "OlMoE", "Step35")
    assert checks["exact"] == [f"{PROVIDERS}Pool{kind}ModelProvider" for kind in kinds]
    assert checks["prefixes"] == []
    assert len(checks["hostile"]) > 10
    for target, tried in (checks["hostile"] | {"os.system": checks["nested"]}).items():
        assert tried["error"] == "InstantiationException", target
        # not by a call that failed
        assert target in tried["message"]
        assert "not allowed" in tried["message"], target


def test_our_readers_call_nothing(checks):
    read = checks["read"]
    assert read["target"] == 3
    assert read["tag"]["error"] == read["stock tag"]["error"] == "ValueError"
    assert "tag.yaml" in read["tag"]["message"]
    assert read["stock target"]["error"] == "ValueError"
    assert "model._target_" in read["stock target"]["message"]
    assert not read["was written"]
    assert not checks["was called"]


def test_the_stock_file_knows_no_pools(checks, checks_folder):
    assert checks["model"]
    text = (checks_folder / "stock" / "run_config.yaml").read_text()
    assert "megatron.bridge.models.olmoe.olmoe_provider.OlMoEModelProvider" in text
    assert "emo_megatron" not in text
    assert "\n  pool_" not in text


@pytest.mark.slow
def test_stock_bridge_reads_the_stock_file(start_bridge, checks, checks_folder):
    assert checks["model"]
    start_bridge(sys.executable, "-m", "support.bridge_checks", "stock", checks_folder)
    assert json.loads((checks_folder / "stock.json").read_text()) == {
        "model": "megatron.bridge.models.olmoe.olmoe_provider.OlMoEModelProvider",
        "num_layers": 4,
        "has pools": [],
        "imported": [],
    }


def test_padding_is_told_by_the_loss(checks):
    # samples of 8 tokens and a label more, of which 6, 7, 8 and 9 are text; a filler; a loss left out in the middle
    assert checks["padding"] == [2, 1, 0, 0, 8, 0]
    # where the loss leaves out the ends of documents too, it tells nothing
    assert checks["padding without ends"] is None


@pytest.mark.parametrize(
    ("format", "rows", "norm"),
    [
        ("qwen2_moe", 18, "model.layers.1.post_attention_layernorm.weight"),
        ("emo", 16, "model.layers.1.pre_feedforward_layernorm.weight"),
    ],
)
def test_bridge_finds_every_name_of_our_table_both_ways(checks, format, rows, norm):
    names = checks["names"][format]
    # a row of experts has two parameters
    assert len(names) == 18
    found = [name for name in names if name[2] is not None]
    assert len(found) == rows
    grouped = {tuple(weights): parameter for parameter, weights, _, _ in reversed(found)}
    for _, weights, theirs, back in found:
        assert theirs == weights
        assert set(back) == {grouped[tuple(weights)]}
    assert checks["names"][f"{format} norm"] == norm
    # what the format does not have
    assert {name[0].rpartition(".")[2] for name in names if name[2] is None} == (
        set() if format == "qwen2_moe" else {"bias", "gate_weight"}
    )
