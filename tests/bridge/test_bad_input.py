"""What a recipe cannot have is one ValueError that names the field, before any process group exists."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

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
    assert "megatron-bridge >= 0.6, < 0.7" in error
    assert (version or "docs/bridge.md") in error
