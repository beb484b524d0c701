"""AutoBridge on small folders of both formats, on a CPU: `python -m support.bridge_hf FOLDER`, which writes hf.json.

One process tries all cases, because importing Bridge takes longer than they do. `python -m support.bridge_hf OUTPUT
FOLDER RUN` exports a run's checkpoint instead, as the model in a folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from support import bridge_recipes, decoder, words
from support.bridge_stand_ins import stand_ins

with stand_ins():
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training.model_load_save import temporary_distributed_context

import torch
import transformers
from safetensors.torch import load_file, save_file

import emo_megatron.bridge  # noqa: F401  registers the formats
from emo_megatron.bridge import hf
from emo_megatron.checkpoint.bridge_flags import REQUIRED, WITHOUT_FIELD
from emo_megatron.checkpoint.flag_lists import FUNCTION
from emo_megatron.hf.config_file import RECORD
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.hf.formats import FORMATS, QWEN2_MOE
from emo_megatron.hf.mapping import Architecture
from emo_megatron.hf.megatron import values_of

VOCAB = decoder.SMALL["vocab_size"]
TOKENS = 40
TINY_GATE = 2.0**-20
"""The constant gate that earlier releases wrote on request."""


def folder_of(folder: Path, format: str, model: Architecture, **options: Any) -> Path:
    """A folder with a tokenizer, as `export` writes it."""
    written = decoder.write_folder(folder, format, model=model, **options)
    words.write_numbers(written, size=VOCAB)
    return written


def provider(bridge: Any, **fields: Any) -> Any:
    """What AutoBridge gives, without the parts of a GPU."""
    found = bridge.to_megatron_provider()
    given = bridge_recipes.WITHOUT_GPU | {"perform_initialization": False, "seq_length": 48} | fields
    for name, value in given.items():
        setattr(found, name, value)
    found.finalize()
    return found


def model_of(bridge: Any, **fields: Any) -> list[Any]:
    chunks: list[Any] = provider(bridge, **fields).provide_distributed_model(
        wrap_with_ddp=False, use_cpu_initialization=True
    )
    return chunks


@torch.no_grad()
def logits(chunks: list[Any]) -> torch.Tensor:
    """[T, V]"""
    tokens_1T = torch.arange(TOKENS)[None] * 7 % VOCAB
    positions_1T = torch.arange(TOKENS)[None]
    found: torch.Tensor = chunks[0].eval()(input_ids=tokens_1T, position_ids=positions_1T, attention_mask=None)
    return found[0]


@torch.no_grad()
def logits_of_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = model(torch.arange(TOKENS)[None] * 7 % VOCAB).logits[0]
    return found


@contextlib.contextmanager
def groups() -> Iterator[None]:
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with temporary_distributed_context():
        model_parallel_cuda_manual_seed(0)
        yield


def save(bridge: Any, chunks: list[Any], output: Path) -> dict[str, torch.Tensor]:
    # the export asks ModelOpt whether weights are quantized
    with stand_ins():
        bridge.save_hf_pretrained(chunks, output)
    return load_file(output / "model.safetensors")


def unequal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in a bit."""
    both = found.keys() & wanted.keys()
    return sorted(
        (found.keys() ^ wanted.keys()) | {name for name in both if not torch.equal(found[name], wanted[name])}
    )


def round_trip(folder: Path, variant: str) -> dict[str, Any]:
    """A folder of each format into Bridge and back."""
    model = decoder.architecture(**decoder.VARIANTS[variant])
    weights = decoder.random_weights(model)
    record = {RECORD: {"pools": {"pool_min": max(3, model.top_k), "pool_documents": "routers"}}}
    formats = [name for name, format in FORMATS.items() if not format.problems(model)]
    folders = {
        name: folder_of(folder / name, name, model, weights=weights, extra_config=record if name == "qwen2_moe" else {})
        for name in formats
    }
    found: dict[str, Any] = {"formats": formats}
    with groups():
        for name, path in folders.items():
            bridge = AutoBridge.from_hf_pretrained(str(path))
            chunks = model_of(bridge)
            wanted = logits_of_transformers(folders["qwen2_moe"])
            written = save(bridge, chunks, folder / f"{name}-again")
            routers = {
                type(layer.mlp.router).__name__ for layer in chunks[0].decoder.layers if hasattr(layer.mlp, "router")
            }
            found[name] = {
                "provider": type(chunks[0].config).__name__,
                "routers": sorted(routers),
                "difference": float((logits(chunks) - wanted).abs().max()),
                "size": float(wanted.abs().max()),
                "unequal": unequal(written, load_file(path / "model.safetensors")),
                "same architecture": HuggingFaceFolder(folder / f"{name}-again").architecture == model,
            }
        if "emo" in folders:
            # the weights of one format in the other
            other = AutoBridge.from_hf_pretrained(str(folders["emo"]))
            chunks = model_of(AutoBridge.from_hf_pretrained(str(folders["qwen2_moe"])))
            found["across"] = unequal(
                save(other, chunks, folder / "across"), load_file(folders["emo"] / "model.safetensors")
            )
    return found


def tiny_gate(folder: Path) -> list[str]:
    """A folder of an earlier release keeps its constant gates in Bridge; gives the names of unequal tensors."""
    source = folder_of(folder / "source", "qwen2_moe", decoder.architecture())
    stored = load_file(source / "model.safetensors")
    gates = {name: torch.full_like(gate, TINY_GATE) for name, gate in stored.items() if "shared_expert_gate" in name}
    save_file(stored | gates, source / "model.safetensors", metadata={"format": "pt"})
    with groups():
        bridge = AutoBridge.from_hf_pretrained(str(source))
        written = save(bridge, model_of(bridge), folder / "again")
    assert float(written["model.layers.0.mlp.shared_expert_gate.weight"].max()) == TINY_GATE
    return unequal(written, load_file(source / "model.safetensors"))


def padded(folder: Path) -> list[str]:
    """A model whose vocabulary Bridge pads to the folder's rows; gives the names of unequal tensors."""
    source = folder_of(folder / "source", "qwen2_moe", decoder.architecture())
    with groups():
        bridge = AutoBridge.from_hf_pretrained(str(source))
        fields = {"should_pad_vocab": True, "vocab_size": VOCAB - 5, "make_vocab_size_divisible_by": 16}
        written = save(bridge, model_of(bridge, **fields), folder / "again")
    return unequal(written, load_file(source / "model.safetensors"))


def own_layers(config: Any) -> Any:
    """Layers of a user, which may compute anything."""
    return local_layer_spec(config)


class Broken:
    """Weights that cannot be opened, because of an attribute that is missing."""

    config = transformers.Qwen2MoeConfig()

    class state:
        index = None


def refusals(folder: Path) -> dict[str, Any]:
    """Case -> the error."""
    base = decoder.architecture()
    plain = folder_of(folder / "plain", "qwen2_moe", base)
    gated = folder_of(folder / "gated", "qwen2_moe", decoder.architecture(shared_gate=True, qkv_bias=True))
    wide = folder_of(folder / "wide", "qwen2_moe", decoder.architecture(shared_hidden=24))
    authors = folder_of(folder / "authors", "emo", base)
    found = {}
    with groups():
        for name, source, fields in (
            ("gate", gated, {"moe_shared_expert_gate": False}),
            ("bias", gated, {"add_qkv_bias": False}),
            ("experts", plain, {"num_moe_experts": 4}),
            ("qk norm", plain, {"qk_layernorm": True}),
            ("activation", plain, {"activation_func": torch.nn.functional.relu}),
            ("vocabulary", plain, {"vocab_size": VOCAB + 16}),
            ("own layers", plain, {"transformer_layer_spec": own_layers}),
            ("partial of own layers", plain, {"transformer_layer_spec": functools.partial(own_layers)}),
        ):
            found[name] = tried(model_of, AutoBridge.from_hf_pretrained(str(source)), **fields)
        chunks = model_of(AutoBridge.from_hf_pretrained(str(wide)))
        emo = AutoBridge.from_hf_pretrained(str(authors))
        found["another folder"] = tried(save, emo, chunks, folder / "no")
        for case, fields in (("wide", {}), ("renormalised", {"moe_router_pre_softmax": False})):
            config = provider(AutoBridge.from_hf_pretrained(str(wide)), **fields)
            found[f"config {case}"] = tried(emo._model_bridge.megatron_to_hf_config, config)
        dense = provider(AutoBridge.from_hf_pretrained(str(plain)))
        dense.num_moe_experts = None
        found["config dense"] = tried(emo._model_bridge.megatron_to_hf_config, dense)
        adapted = model_of(AutoBridge.from_hf_pretrained(str(plain)))
        adapted[0].decoder.layers[0].mlp.adapter = torch.nn.Module()
        adapted[0].decoder.layers[0].mlp.adapter.weight = torch.nn.Parameter(torch.zeros(1))
        found["adapters"] = tried(save, AutoBridge.from_hf_pretrained(str(plain)), adapted, folder / "no")
    found["broken weights"] = tried(hf.source_of, Broken(), QWEN2_MOE)
    source = hf.source_of(AutoBridge.from_hf_pretrained(str(plain)).hf_pretrained, QWEN2_MOE)
    with mock.patch.object(hf, "values_of", lambda model: values_of(model) | {"made_up": 1}):
        found["flag without a field"] = tried(hf.provider_of, source, dtype=torch.float32)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    found["sliding window"] = tried(AutoBridge.from_hf_pretrained(str(plain)).to_megatron_provider)
    found["written"] = sorted(path.name for path in (folder / "no").iterdir())
    return found


def tried(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    """The type and message of an error."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def named(kind: str, **parameters: torch.Tensor) -> torch.nn.Module:
    """A module of a class of Transformer Engine's name, which tells Bridge how ranks split the parameters."""
    module = type(kind, (torch.nn.Module,), {})()
    for name, value in parameters.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))
    return module


def with_names_of_te(chunks: list[Any]) -> list[Any]:
    """The model with the parameters, all zero, of Transformer Engine's layers: grouped experts and fused norms."""
    for layer in chunks[0].decoder.layers:
        qkv, norm = layer.self_attention.linear_qkv, layer.input_layernorm.weight
        both = dict(qkv.named_parameters()) | {"layer_norm_weight": norm}
        layer.self_attention.linear_qkv = named("TELayerNormColumnParallelLinear", **both)
        layer.input_layernorm = torch.nn.Identity()
        if not hasattr(layer.mlp, "experts"):
            both = {"weight": layer.mlp.linear_fc1.weight, "layer_norm_weight": layer.pre_mlp_layernorm.weight}
            layer.mlp.linear_fc1 = named("TELayerNormColumnParallelLinear", **both)
            layer.pre_mlp_layernorm = torch.nn.Identity()
            continue
        alone, layer.mlp.experts = layer.mlp.experts.local_experts, torch.nn.Module()
        for name, kind in {"linear_fc1": "Column", "linear_fc2": "Row"}.items():
            weights = {f"weight{number}": getattr(expert, name).weight for number, expert in enumerate(alone)}
            setattr(layer.mlp.experts, name, named(f"TE{kind}ParallelGroupedLinear", **weights))
    return chunks


def grouped(folder: Path, variant: str, format: str) -> dict[str, Any]:
    """Weights into the parameters of Transformer Engine's layers and back."""
    source = folder_of(folder / "source", format, decoder.architecture(**decoder.VARIANTS[variant]))
    with groups():
        bridge = AutoBridge.from_hf_pretrained(str(source))
        chunks = with_names_of_te(model_of(bridge))
        bridge.load_hf_weights(chunks)
        written = save(bridge, chunks, folder / "again")
    names = [name for name, _ in chunks[0].named_parameters()]
    return {
        "unequal": unequal(written, load_file(source / "model.safetensors")),
        "kinds": [any(part in name for name in names) for part in ("fc2.weight5", "fc1.layer_norm", "qkv.layer_norm")],
    }


def from_configuration() -> dict[str, Any]:
    """AutoBridge of a configuration alone: the model it makes is the model the configuration describes."""
    found = {}
    for name, fields in {"stock": {}, "without biases": {"qkv_bias": False}}.items():
        config = transformers.Qwen2MoeConfig(
            vocab_size=80,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=24,
            architectures=["Qwen2MoeForCausalLM"],
            **fields,
        )
        made = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
        found[name] = [made.add_qkv_bias, made.moe_shared_expert_gate, made.moe_shared_expert_intermediate_size]
    return found


def lists() -> dict[str, list[str]]:
    """Names in which lists of the package differ from what the lists are of."""
    provider = {field.name for field in dataclasses.fields(GPTModelProvider)}
    return {
        "architecture": sorted({field.name for field in dataclasses.fields(Architecture)} ^ hf.FIELDS.keys()),
        "without field": sorted(FUNCTION - provider ^ WITHOUT_FIELD),
        "required": sorted(REQUIRED - provider),
        "messages": sorted(set(hf.FIELDS.values()) - provider),
    }


def dense_layers(folder: Path) -> list[list[int]]:
    """Dense layers in config.json of a provider with layers of one kind, and of a provider with layers of each kind."""
    source = folder_of(folder, "qwen2_moe", decoder.architecture(dense_layers=(0,), dense_hidden=20))
    found = []
    for fields in ({"transformer_layer_spec": local_layer_spec}, {}):
        made = provider(AutoBridge.from_hf_pretrained(str(source)), **fields)
        assert made.moe_layer_freq == [0, 1, 1]
        found.append(hf.Qwen2MoeBridge.megatron_to_hf_config(made)["mlp_only_layers"])
    return found


def export(output: str, folder: str, run: str) -> None:
    """As docs/bridge.md exports a run."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    # the export asks ModelOpt whether weights are quantized
    with stand_ins():
        bridge.export_ckpt(run, output)


def main() -> None:
    if len(sys.argv) > 2:
        export(*sys.argv[1:])
        return
    folder, found = Path(sys.argv[1]), {}
    for number, variant in enumerate(decoder.VARIANTS):
        found[variant] = round_trip(folder / str(number), variant)
    dense = "wide shared expert, dense layers"
    found["grouped"] = {
        "qwen2_moe": grouped(folder / "grouped", dense, "qwen2_moe"),
        "emo": grouped(folder / "emo", "the paper's", "emo"),
    }
    found["padded"] = padded(folder / "padded")
    found["tiny gate"] = tiny_gate(folder / "tiny")
    found["refused"] = refusals(folder / "refused")
    found["lists"], found["dense layers"] = lists(), dense_layers(folder / "dense")
    found["configuration"] = from_configuration()
    (folder / "hf.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
