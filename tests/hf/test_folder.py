"""emo_megatron.hf.folder: shards and their index, and folders that are not whole."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import decoder
from support.running import limited

from emo_megatron.hf.folder import INDEX, HuggingFaceFolder
from emo_megatron.hf.mapping import weight_shapes
from emo_megatron.runners.huggingface import load_hugging_face


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    more = {"eos_token_id": 5, "emo_megatron": {"version": "0"}}
    return decoder.write_folder(tmp_path / "out", extra_config=more, shard_bytes=30_000)


def test_shards_are_as_large_as_asked_for_and_the_index_names_them(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 35_000 for file in files)
    index = json.loads((sharded / INDEX).read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    read = HuggingFaceFolder(sharded)
    assert index["metadata"]["total_size"] == 4 * sum(read.read(n).numel() for n in read.shapes)
    weights = decoder.random_weights(read.architecture)
    assert all(torch.equal(read.weight(name), weights[name]) for name in weight_shapes(read.architecture))


def test_stock_transformers_read_the_shards(sharded: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sharded)
    weights = decoder.random_weights(HuggingFaceFolder(sharded).architecture)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_more_fields_of_the_configuration_join_the_formats_own(sharded: Path) -> None:
    config = HuggingFaceFolder(sharded).config
    assert config["eos_token_id"] == 5
    assert config["emo_megatron"]["version"] == "0"
    assert config["emo_megatron"]["shared_expert"] is True
    assert config["torch_dtype"] == "float32"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(ValueError, match=f"not whole: .*{victim.name}"):
        HuggingFaceFolder(sharded)


def test_a_file_that_was_cut_short_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{victim.name} is damaged or was cut short"):
        HuggingFaceFolder(sharded)


def test_an_index_that_names_another_file_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    names = list(index["weight_map"])
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not match its files"):
        HuggingFaceFolder(sharded)


@pytest.mark.parametrize("kind", ["gone", "another shape", "another type", "unknown"])
def test_tensors_that_do_not_fit_are_named(kind: str, sharded: Path) -> None:
    (sharded / INDEX).unlink()
    tensors = {}
    for file in sharded.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    changed = {
        "gone": (lambda: tensors.pop(name), "1 tensors are missing, .*experts.3.up_proj"),
        "another shape": (
            lambda: tensors.update({name: tensors[name][:4].clone()}),
            r"experts.3.up_proj.weight must have the shape \[12, 32\]; got \[4, 32\]",
        ),
        "another type": (lambda: tensors.update({name: tensors[name].half()}), "one dtype, .*got F16, F32"),
        "unknown": (
            lambda: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "have no place in the model, .*q_norm",
        ),
    }
    change, reason = changed[kind]
    change()
    save_file(tensors, sharded / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        HuggingFaceFolder(sharded)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a Hugging Face checkpoint.*config\.json"):
        HuggingFaceFolder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        HuggingFaceFolder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    with pytest.raises(ValueError, match=r"model\.safetensors is missing .*\.bin files are not read"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config", "hf_quant_config.json"])
def test_a_quantised_model_is_refused_by_the_field(field: str, sharded: Path) -> None:
    file = sharded / ("config.json" if field.endswith("_config") else field)
    described = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(described | {field: {"quant_method": "modelopt", "quant_algo": "FP8"}}))
    for read in (HuggingFaceFolder, load_hugging_face):
        with pytest.raises(ValueError, match=field) as error:
            read(sharded)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weight_map",
    [
        *(None, [], "text", 1, {}, {"a": 1}, {"a": "b"}, {"a": None}, {"a": ["b"]}, {"a": {}}),
        *({"a": ".."}, {"a": "../out/config.json"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": "b\0.safetensors"}),
    ],
)
def test_an_index_that_names_no_files_of_its_folder_is_refused(weight_map: object, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"{INDEX}: weight_map") as told:
        HuggingFaceFolder(sharded)
    assert "\n" not in str(told.value)


def header(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"1234567", (2**63).to_bytes(8, "little"), b"PK\3\4" + bytes(100), header("{")),
        *(header("[]"), header("[" * 10_000), header(b"\xff\xfe"), header("{}")),
        header('{"a": 1}'),
        header('{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}') + bytes(8),
        header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 40]}}') + bytes(4),
    ],
)
def test_a_file_whose_header_lies_is_refused_by_name(content: bytes, sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.write_bytes(content)
    # an index that does not fit its files names the file of a tensor or the tensor
    with pytest.raises(ValueError, match=f"{victim.name}|{INDEX} does not match"):
        HuggingFaceFolder(sharded)


def test_too_many_open_files_are_no_damage(sharded: Path) -> None:
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    with limited(resource.RLIMIT_NOFILE, lowest + 1), pytest.raises(OSError, match=r"\.safetensors") as told:
        HuggingFaceFolder(sharded)
    assert told.value.errno == errno.EMFILE
