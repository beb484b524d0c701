"""AutoBridge on folders of Qwen2-MoE and of the EMO authors (support/bridge_hf.py): into Bridge, and back."""

from __future__ import annotations

import json

import pytest
from support import decoder

NAMED = {
    "gate": "model.moe_shared_expert_gate",
    "bias": "model.add_qkv_bias",
    "experts": "model.num_moe_experts",
    "qk norm": "model.qk_layernorm",
    "activation": "model.activation_func",
    "vocabulary": "model.vocab_size",
    "own layers": "own_layers",
    "partial of own layers": "own_layers",
    "config dense": "model.num_moe_experts",
    "flag without a field": "made_up",
    "another folder": "model.moe_shared_expert_intermediate_size",
    "config wide": "model.moe_shared_expert_intermediate_size",
    "config renormalised": "model.moe_router_pre_softmax",
    "sliding window": "use_sliding_window",
}
BOTH = {"the paper's", "no shared expert", "no shared expert, renormalised", "tied, as many experts as a token uses"}


@pytest.fixture(scope="module")
def found(run_bridge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    run_bridge("-m", "support.bridge_hf", folder)
    return json.loads((folder / "hf.json").read_text())


@pytest.mark.parametrize("variant", decoder.VARIANTS)
def test_the_model_is_the_same_in_bridge_and_comes_back_bit_for_bit(found, variant):
    assert found[variant]["formats"] == ["qwen2_moe", "emo"][: 1 + (variant in BOTH)]
    for format in found[variant]["formats"]:
        seen = found[variant][format]
        assert seen["size"] > 1
        assert seen["difference"] < 1e-5 * seen["size"]
        # those of the EMO format have no record of pools
        pooled = format == "qwen2_moe"
        assert seen["provider"] == ("PoolGPTModelProvider" if pooled else "GPTModelProvider")
        assert seen["routers"] == ["PoolRouter" if pooled else "TopKRouter"]
        assert seen["unequal"] == []
        assert seen["same architecture"]


@pytest.mark.parametrize("variant", sorted(BOTH))
def test_a_model_of_one_format_is_exported_in_the_other(found, variant):
    assert found[variant]["across"] == []


@pytest.mark.parametrize("format", ["qwen2_moe", "emo"])
def test_parameters_of_transformer_engine_are_found(found, format):
    seen = found["grouped"][format]
    assert seen["unequal"] == []
    # grouped experts, the norm of a dense layer's MLP, the norm of attention
    assert seen["kinds"] == [True, format == "qwen2_moe", True]


def test_a_folder_for_llama_cpp_keeps_its_gates(found):
    assert found["tiny gate"] == []


def test_a_padded_vocabulary_is_the_folders(found):
    assert found["padded"] == []


@pytest.mark.parametrize("case", NAMED)
def test_another_model_is_one_line_that_names_the_field(found, case):
    kind, message = found["refused"][case]
    assert kind == "ValueError"
    assert NAMED[case] in message
    assert "\n" not in message
    # no flag of another host
    assert "--" not in message


def test_adapters_are_not_merged(found):
    assert found["refused"]["adapters"][0] == "NotImplementedError"


def test_a_refused_export_leaves_no_weights(found):
    # as docs/bridge.md says, Bridge writes these first
    assert "config.json" in found["refused"]["written"]
    assert not [name for name in found["refused"]["written"] if "safetensors" in name]


def test_a_configuration_alone_gives_its_model(found):
    assert found["configuration"] == {"stock": [True, True, 24], "without biases": [False, True, 24]}


def test_layers_of_one_kind_are_all_of_experts(found):
    assert found["dense layers"] == [[], [0]]


def test_weights_that_do_not_open_are_not_a_configuration(found):
    kind, message = found["refused"]["broken weights"]
    assert kind == "AttributeError"
    assert "source" in message


def test_lists_of_fields_are_those_of_bridge(found):
    assert found["lists"] == {"architecture": [], "without field": [], "required": [], "messages": []}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "expert", "pipeline"])
def test_two_ranks_export_the_bits_of_one(run_bridge, tmp_path, kind):
    run_bridge("-m", "support.bridge_hf_ranks", tmp_path, kind)
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert found.keys() == {"qwen2_moe", "qwen2_moe, gated", "emo"}
    for one in found.values():
        # what is split does not lie whole on a rank
        assert one["is split"]
        assert one["unequal"] == []
