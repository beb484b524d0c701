"""A run_config.yaml of Megatron-Bridge becomes Megatron's flags of the same model, or one line names the field."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from support import decoder

from emo_megatron.checkpoint import bridge_flags
from emo_megatron.checkpoint.bridge_flags import RUN_CONFIG, fields_of, flags_of_run, model_of, read_run_config
from emo_megatron.checkpoint.flag_lists import AS_TRAINED, FUNCTION, NOT_THE_MODEL
from emo_megatron.checkpoint.model_flags import megatron_parser
from emo_megatron.checkpoint.reader import MegatronCheckpoint, metadata_of
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.hf.mapping import FUSED_NORM, Architecture
from emo_megatron.hf.megatron import (
    MegatronWeights,
    architecture_of,
    architecture_of_flags,
    megatron_weights,
    values_of,
)

STORED = Path(__file__).resolve().parents[1] / "data" / "bridge_run_config.yaml"
MODEL = Architecture(
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    num_experts=8,
    top_k=2,
    expert_hidden=32,
    shared_hidden=32,
    max_positions=64,
    norm_eps=1e-5,
)
"""The model of STORED."""
BLOCK = {
    "_target_": bridge_flags.BLOCK_SPEC,
    "_partial_": True,
    "_args_": [],
    "use_transformer_engine": False,
    "normalization": "RMSNorm",
}
"""Megatron's layers with experts by moe_layer_freq, as AutoBridge names them on a CPU."""
GELU = {"gated_linear_unit": False, "activation_func": {"_target_": "torch.nn.functional.gelu"}}
SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}


@pytest.fixture
def config():
    return read_run_config(STORED)


def written(config, folder, **fields):
    """A run_config.yaml with other fields of the model."""
    config = copy.deepcopy(config)
    config["model"] |= fields
    folder.mkdir(exist_ok=True)
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(config))
    return folder / RUN_CONFIG


@pytest.fixture
def checkpoint(tmp_path, config):
    """A checkpoint as Bridge leaves it: weights and the file, no flags."""
    weights = decoder.random_weights(MODEL)
    tensors = megatron_weights(MODEL, weights.__getitem__, dtype=torch.float32, moe_norm=FUSED_NORM)
    path = write_checkpoint(tmp_path / "run", tensors, args=argparse.Namespace())
    found = MegatronCheckpoint(path)
    del found.common["args"]
    written(config, found.path)
    return found


def test_the_model_that_bridge_trained_is_read(checkpoint):
    assert architecture_of(checkpoint) == MODEL
    # the flags are made once
    assert checkpoint.args is checkpoint.args
    assert checkpoint.args.pool_min == 2
    assert checkpoint.args.params_dtype == torch.float32
    assert metadata_of(checkpoint).num_experts == 8
    read = MegatronWeights(checkpoint, MODEL).read
    weights = decoder.random_weights(MODEL)
    assert all(torch.equal(read(name), weight) for name, weight in weights.items())


def test_megatron_would_take_every_flag(checkpoint):
    """A module has these flags, and Megatron and Bridge read the flags of a module."""
    assert vars(megatron_parser().parse_args([])).keys() <= vars(checkpoint.args).keys()


def test_a_checkpoint_with_neither_flags_nor_run_config_is_refused(checkpoint):
    (checkpoint.path / RUN_CONFIG).unlink()
    with pytest.raises(ValueError, match="flags of its run"):
        assert checkpoint.args


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"softmax_scale": 0.5}, "model.softmax_scale"),
        ({"an_option_of_tomorrow": True}, "model.an_option_of_tomorrow"),
        ({"quant_recipe": {"_target_": "megatron.core.quantization.RecipeConfig"}}, "model.quant_recipe"),
        ({"yarn_mscale": 1.0}, "model.yarn_mscale"),
        ({"multi_latent_attention": True}, "model.multi_latent_attention"),
        ({"position_embedding_type": "yarn"}, "model.position_embedding_type"),
        ({"gated_linear_unit": False}, "model.activation_func"),
        ({"activation_func": {"_target_": "mine.swish"}}, "model.activation_func"),
        ({"activation_func": {"_target_": "mine.silu"}}, "model.activation_func"),
        (
            {
                "gated_linear_unit": False,
                "activation_func": {"_target_": "torch.nn.functional.gelu", "_partial_": True, "approximate": "tanh"},
            },
            "model.activation_func",
        ),
        ({"params_dtype": {"_target_": "torch.float8_e4m3fn"}}, "model.params_dtype"),
        ({"window_size": {"_target_": "os.system"}}, "model.window_size"),
        ({"transformer_layer_spec": {"_target_": "mine.layers"}}, "mine.layers"),
        (
            {"transformer_layer_spec": {"_target_": "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec"}},
            "model.transformer_layer_spec",
        ),
        # Bridge trained without the field, and a flag would build it
        ({"qk_l2_norm": True}, "model.qk_l2_norm"),
        ({"experimental_attention_variant": "dsa"}, "model.experimental_attention_variant"),
        ({"qk_l2_norm": True, "transformer_layer_spec": BLOCK}, "qk_l2_norm True"),
        ({"transformer_layer_spec": BLOCK | {"qk_l2_norm": True}}, "qk_l2_norm False"),
        ({"transformer_layer_spec": BLOCK | {"use_transformer_engine": True}}, "use_transformer_engine False"),
        ({"transformer_layer_spec": BLOCK | {"normalization": None}}, "normalization 'RMSNorm'"),
        ({"transformer_layer_spec": BLOCK | {"pp_rank": 0}}, "no argument pp_rank"),
        ({"transformer_layer_spec": BLOCK | {"_args_": [1]}}, "no argument _args_"),
        ({"_target_": "mine.GPTModelProvider"}, "model._target_"),
        ({"_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"}, "model._target_"),
    ],
)
def test_what_no_flag_expresses_is_one_line_with_the_field(config, tmp_path, fields, named):
    path = written(config, tmp_path, **fields)
    with pytest.raises(ValueError, match=RUN_CONFIG) as told:
        flags_of_run(path, vocab_rows=512)
    assert named in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"num_moe_experts": 16}, {"num_experts": 16}),
        ({"num_query_groups": 2}, {"num_query_groups": 2, "group_query_attention": True}),
        ({"num_query_groups": None}, {"num_query_groups": 4, "group_query_attention": False}),
        ({"share_embeddings_and_output_weights": True}, {"untie_embeddings_and_output_weights": False}),
        ({"rope_scaling": True}, {"use_rope_scaling": True}),
        ({"seq_len_interpolation_factor": 2.0}, {"rotary_seq_len_interpolation_factor": 2.0}),
        (GELU, {"swiglu": False}),
        # the fused kernel approximates gelu
        (GELU | {"add_bias_linear": True}, {"bias_gelu_fusion": False, "add_bias_linear": True, "swiglu": False}),
        (GELU | {"bias_activation_fusion": True}, {"bias_gelu_fusion": True, "swiglu": False}),
        ({"params_dtype": {"_target_": "torch.bfloat16"}, "bf16": True}, {"params_dtype": torch.bfloat16}),
        ({"seq_length": 128}, {"seq_length": 128, "max_position_embeddings": 128}),
        # the layers of the recipe are alike, whatever the field says
        ({"moe_layer_freq": [0, 1, 1, 1]}, {"moe_layer_freq": 1}),
        ({"moe_layer_freq": [0, 1, 1, 1], "transformer_layer_spec": BLOCK}, {"moe_layer_freq": [0, 1, 1, 1]}),
        ({"transformer_layer_spec": BLOCK | {"qk_l2_norm": True}, "qk_l2_norm": True}, {"qk_l2_norm": True}),
        (
            {
                "transformer_impl": "transformer_engine",
                "transformer_layer_spec": {"_target_": bridge_flags.BLOCK_SPEC, "use_transformer_engine": True},
            },
            {"transformer_impl": "transformer_engine"},
        ),
        # of the run alone
        ({"cuda_graph_scope": "full", "pipeline_dtype": {"_target_": "torch.bfloat16"}}, {}),
        # a module trains on as the run did
        ({"hidden_dropout": 0.2, "attention_dropout": 0.3}, {"hidden_dropout": 0.2, "attention_dropout": 0.3}),
        ({"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}, {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}),
        ({"moe_token_dispatcher_type": "flex"}, {"moe_token_dispatcher_type": "flex"}),
        ({"init_method_std": 0.01}, {"init_method_std": 0.01}),
    ],
)
def test_a_field_becomes_the_flag(config, tmp_path, fields, flags):
    before = vars(flags_of_run(STORED, vocab_rows=512))
    after = vars(flags_of_run(written(config, tmp_path, **fields), vocab_rows=512))
    changed = {name: value for name, value in after.items() if before[name] != value}
    assert {name: after[name] for name in flags} == flags
    assert changed.keys() <= flags.keys() | {"bf16", "num_query_groups", "bias_swiglu_fusion"}


def test_a_module_trains_on_with_the_dropouts_and_losses_of_the_run(checkpoint, config):
    values = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_aux_loss_coeff": 0.025,
        "moe_z_loss_coeff": None,
        "moe_token_dispatcher_type": "alltoall",
        "init_method_std": 0.02,
        "bias_gelu_fusion": False,
    }
    assert {name: getattr(checkpoint.args, name) for name in values} == values
    # Megatron's default, where Bridge stores none
    assert config["model"]["attention_backend"] is None
    assert checkpoint.args.attention_backend is not None


def test_a_field_that_is_missing_is_named(config, tmp_path):
    for name in bridge_flags.REQUIRED:
        with pytest.raises(ValueError, match=rf"missing: {name}$"):
            model_of({field: value for field, value in config["model"].items() if field != name})
    for name in ("num_layers", "qk_layernorm"):
        del config["model"][name]
    with pytest.raises(ValueError, match=RUN_CONFIG) as told:
        flags_of_run(written(config, tmp_path), vocab_rows=512)
    assert "num_layers, qk_layernorm" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("fields", "helps"),
    [
        ({"softmax_scale": 0.5}, False),
        ({"qk_l2_norm": True}, False),
        ({"_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"}, True),
        ({"transformer_layer_spec": {"_target_": "mine.layers"}}, True),
    ],
)
def test_auto_bridge_is_recommended_where_it_may_help(config, tmp_path, fields, helps):
    """AutoBridge for the formats of this package refuses the same fields."""
    with pytest.raises(ValueError, match=RUN_CONFIG) as told:
        flags_of_run(written(config, tmp_path, **fields), vocab_rows=512)
    assert ("AutoBridge" in str(told.value)) is helps


def test_a_field_without_a_flag_is_named_once(config, tmp_path):
    with pytest.raises(ValueError, match="heterogeneous_block_specs") as told:
        flags_of_run(written(config, tmp_path, heterogeneous_block_specs=True), vocab_rows=512)
    assert str(told.value).count("heterogeneous_block_specs") == 1


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"moe_layer_freq": [0, 1, 1, 1]}, [0, 1, 2, 3]),
        ({"moe_layer_freq": [0, 1, 1, 1], "transformer_layer_spec": BLOCK}, [1, 2, 3]),
        ({"moe_layer_freq": 2, "transformer_layer_spec": BLOCK}, [0, 2]),
        ({"num_moe_experts": None}, []),
    ],
)
def test_layers_with_experts_are_those_that_bridge_builds(config, fields, layers):
    assert bridge_flags.moe_layers_of(config["model"] | fields) == layers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hf_tokenizer_kwargs", {"use_fast": False}),
        ("sp_tokenizer_kwargs", {"legacy": True}),
        ("chat_template_path", "template.jinja"),
        ("an_option_of_tomorrow", True),
    ],
)
def test_a_tokenizer_that_no_flag_expresses_is_one_line_with_the_field(config, tmp_path, name, value):
    config["tokenizer"][name] = value
    with pytest.raises(ValueError, match=rf"{RUN_CONFIG}.*tokenizer\.{name}") as told:
        flags_of_run(written(config, tmp_path), vocab_rows=512)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("variant", decoder.VARIANTS)
def test_fields_of_a_model_give_the_model_again(config, variant):
    model = decoder.architecture(**decoder.VARIANTS[variant])
    fields = fields_of(values_of(model))
    assert fields["num_moe_experts"] == model.num_experts
    plain = {"activation_func": SILU, "params_dtype": {"_target_": "torch.float32"}, "transformer_layer_spec": BLOCK}
    flags = argparse.Namespace(**model_of(config["model"] | fields | plain))
    assert bridge_flags.moe_layers_of(config["model"] | fields | plain) == list(model.moe_layers)
    assert architecture_of_flags(flags, moe_layers=model.moe_layers, vocab_size=model.vocab_size) == model


def test_only_a_swiglu_model_becomes_fields():
    with pytest.raises(ValueError, match="--swiglu"):
        fields_of(values_of(MODEL) | {"swiglu": False})


def test_every_field_that_is_ignored_is_ignored_for_one_reason():
    lists = FUNCTION | AS_TRAINED | NOT_THE_MODEL
    assert not lists & bridge_flags.OF_THE_RUN
    assert not lists & bridge_flags.RENAMED.keys()
    assert bridge_flags.RENAMED.keys().isdisjoint(bridge_flags.OF_THE_RUN)


def test_the_tokenizer_in_the_checkpoint_is_preferred(config, tmp_path):
    config["tokenizer"] |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "somebody/model"}
    path = written(config, tmp_path)
    assert flags_of_run(path, vocab_rows=512).tokenizer_model == "somebody/model"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert flags_of_run(path, vocab_rows=512).tokenizer_model == str(tmp_path / "tokenizer")
    # the copy is of this revision; without the copy, the flags would name another one
    config["tokenizer"]["hf_tokenizer_kwargs"] = {"revision": "a1b2"}
    assert flags_of_run(written(config, tmp_path), vocab_rows=512).tokenizer_model == str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"tokenizer\.hf_tokenizer_kwargs"):
        flags_of_run(written(config, tmp_path / "no copy"), vocab_rows=512)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "model: 3", "model: {a: [", "model: !!python/object/apply:os.system ['touch called']"]
)
def test_a_file_that_is_no_run_config_is_one_line(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / RUN_CONFIG).write_text(text)
    with pytest.raises(ValueError, match=RUN_CONFIG) as told:
        flags_of_run(tmp_path / RUN_CONFIG, vocab_rows=512)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "called").exists()


def test_pools_are_read_too(checkpoint, config):
    from emo_megatron.config import PoolConfig

    names = [field.name for field in dataclasses.fields(PoolConfig)]
    assert {name: getattr(checkpoint.args, name) for name in names} == {name: config["model"][name] for name in names}
