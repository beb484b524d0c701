"""examples/bridge_recipe.py: it trains a recipe, and a Hugging Face model on from its own weights."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example(run_bridge, tmp_path_factory):
    """What both runs printed, what was seen of the model, and the folder."""
    folder = tmp_path_factory.mktemp("example")
    printed = run_bridge("-m", "support.bridge_example", folder)
    (seen,) = (line for line in printed.splitlines() if line.startswith('{"names"'))
    return printed, json.loads(seen), folder


def test_a_hugging_face_model_starts_from_its_own_weights(example):
    _, seen, _ = example
    assert seen["names"]
    assert seen["loaded"] == seen["made"]
    assert seen["routers"] == ["PoolRouter", "PoolRouter"]


def test_it_trains_on_and_saves(example):
    printed, seen, folder = example
    assert seen["moved"] == seen["parameters"]
    assert len(re.findall(r"iteration\s+\d+/\s+2 .*lm loss: [56]\.", printed)) == 2 * 2
    config = (folder / "hf" / "iter_0000002" / "run_config.yaml").read_text()
    assert "PoolGPTModelProvider" in config
    assert "pool_min: 3\n" in config
    assert "pool_max: 6\n" in config


def test_a_checkpoint_is_exported_with_the_trained_weights(example):
    _, seen, folder = example
    exported = load_file(folder / "exported" / "model.safetensors")
    assert sorted(exported) == sorted(seen["made"])
    before = load_file(folder / "model" / "model.safetensors")
    assert not any(torch.equal(weight, before[name]) for name, weight in exported.items())
    assert json.loads((folder / "exported" / "config.json").read_text())["model_type"] == "qwen3_moe"


def test_the_recipe_trains_with_the_smallest_pools_it_can_have(example):
    printed, _, _ = example
    assert len(re.findall(r"pool_size: [\d.]+", printed)) == 2 * 2
