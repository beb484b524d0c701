"""A run_config.yaml may name our providers and nothing else of ours; our own readers call nothing in it."""

import dataclasses
import json

import pytest

from emo_megatron.config import PoolConfig

PROVIDERS = "emo_megatron.bridge.providers."
WANTED = {"pool_min": 3, "pool_unrestricted": 0.25, "pool_eval": 4, "pool_documents": "routers"}


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
def test_stock_bridge_reads_the_stock_file(run_bridge, checks, checks_folder):
    assert checks["model"]
    run_bridge("-m", "support.bridge_checks", "stock", checks_folder)
    assert json.loads((checks_folder / "stock.json").read_text()) == {
        "model": "megatron.bridge.models.olmoe.olmoe_provider.OlMoEModelProvider",
        "num_layers": 4,
        "has pools": [],
        "imported": [],
    }
