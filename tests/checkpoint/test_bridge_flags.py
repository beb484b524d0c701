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
from emo_megatron.checkpoint.model_flags import AS_TRAINED, FUNCTION, NOT_THE_MODEL, megatron_parser
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
        ({"gated_linear_unit": False, "activation_func": {"_target_": "torch.nn.functional.gelu"}}, {"swiglu": False}),
        ({"params_dtype": {"_target_": "torch.bfloat16"}, "bf16": True}, {"params_dtype": torch.bfloat16}),
        ({"seq_length": 128}, {"seq_length": 128, "max_position_embeddings": 128}),
        # the layers of the recipe are alike, whatever the field says
        ({"moe_layer_freq": [0, 1, 1, 1]}, {"moe_layer_freq": 1}),
        (
            {
                "moe_layer_freq": [0, 1, 1, 1],
                "transformer_layer_spec": {"_target_": bridge_flags.BLOCK_SPEC, "_partial_": True},
            },
            {"moe_layer_freq": [0, 1, 1, 1]},
        ),
        # of the run alone
        ({"tensor_model_parallel_size": 4, "moe_permute_fusion": True, "cuda_graph_scope": "full"}, {}),
    ],
)
def test_a_field_becomes_the_flag(config, tmp_path, fields, flags):
    before = vars(flags_of_run(STORED, vocab_rows=512))
    after = vars(flags_of_run(written(config, tmp_path, **fields), vocab_rows=512))
    changed = {name: value for name, value in after.items() if before[name] != value}
    assert {name: after[name] for name in flags} == flags
    assert changed.keys() <= flags.keys() | {"bf16", "num_query_groups"}


@pytest.mark.parametrize("variant", decoder.VARIANTS)
def test_fields_of_a_model_give_the_model_again(variant):
    model = decoder.architecture(**decoder.VARIANTS[variant])
    fields = fields_of(values_of(model))
    assert fields["num_moe_experts"] == model.num_experts
    plain = {"activation_func": SILU, "params_dtype": {"_target_": "torch.float32"}}
    flags = argparse.Namespace(**model_of(fields | plain))
    assert architecture_of_flags(flags, moe_layers=model.moe_layers, vocab_size=model.vocab_size) == model


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
