"""A run_config.yaml may name our four providers and nothing else of ours; our own readers call nothing in it."""

import dataclasses
import json

import pytest

from emo_megatron.config import PoolConfig

PROVIDERS = "emo_megatron.bridge.providers."
WANTED = {"pool_min": 3, "pool_unrestricted": 0.25, "pool_eval": 4, "pool_documents": "routers"}


def pools(**fields):
    return dataclasses.asdict(PoolConfig(**fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run_config")


@pytest.fixture(scope="module")
def found(run_bridge, folder):
    printed = run_bridge("-m", "support.bridge_checks", "safety", folder)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("{")))


def test_a_run_config_gives_provider_pools_and_spec_back(found):
    assert found["model"] == "PoolOlMoEModelProvider"
    assert found["has recipe's spec"]
    assert found["pool"] == found["stored"] == pools(**WANTED)
    assert found["by hand"] == 3


def test_fields_are_overridden_by_hydra(found):
    wanted = {"pool_max": 5, "pool_unrestricted": 0.1, "pool_mask": "selection"}
    assert found["overridden"] == pools(pool_min=2, pool_documents="routers", **wanted)


def test_only_providers_may_be_instantiated(found):
    kinds = ("GPT", "Hybrid", "MLA", "OlMoE")
    assert found["exact"] == [f"{PROVIDERS}Pool{kind}ModelProvider" for kind in kinds]
    assert found["prefixes"] == []
    assert len(found["hostile"]) > 10
    for target, tried in (found["hostile"] | {"os.system": found["nested"]}).items():
        assert tried["error"] == "InstantiationException", target
        # not by a call that failed
        assert target in tried["message"]
        assert "not allowed" in tried["message"], target


def test_our_readers_call_nothing(found):
    read = found["read"]
    assert read["target"] == 3
    assert read["tag"]["error"] == read["stock tag"]["error"] == "ValueError"
    assert "tag.yaml" in read["tag"]["message"]
    assert read["stock target"]["error"] == "ValueError"
    assert "model._target_" in read["stock target"]["message"]
    assert not read["was written"]
    assert not found["was called"]


def test_stock_bridge_reads_the_stock_file(run_bridge, found, folder):
    text = (folder / "stock" / "run_config.yaml").read_text()
    assert "emo_megatron" not in text
    assert "\n  pool_" not in text
    printed = run_bridge("-m", "support.bridge_checks", "stock", folder)
    stock = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert stock == {
        "model": "megatron.bridge.models.olmoe.olmoe_provider.OlMoEModelProvider",
        "num_layers": 4,
        "has pools": [],
        "imported": [],
    }
