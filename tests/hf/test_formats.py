"""emo_megatron.hf: each format holds the model, bit for bit and as its loaders compute it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import decoder
from torch import Tensor

from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.hf.formats import EMO, QWEN2_MOE, from_file, to_file
from emo_megatron.hf.mapping import Architecture, weight_shapes

TOKENS = torch.arange(40) * 7 % 80
EXPRESSIBLE_AS_EMO = ("the paper's", "no shared expert", "no shared expert, renormalised")


def write(
    folder: Path, format: str, model: Architecture, weights: Mapping[str, Tensor], **options: Any
) -> HuggingFaceFolder:
    return HuggingFaceFolder(decoder.write_folder(folder, format, model=model, weights=weights, **options))


def stock_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    with torch.no_grad():
        return model(TOKENS[None]).logits[0].double()


@pytest.mark.parametrize("variant", decoder.VARIANTS)
def test_stock_transformers_compute_the_model(variant: str, tmp_path: Path) -> None:
    model = decoder.architecture(**decoder.VARIANTS[variant])
    weights = decoder.random_weights(model)
    write(tmp_path / "out", "qwen2_moe", model, weights)
    expected = decoder.logits(model, weights, TOKENS)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(stock_logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("format", "variant"),
    [*(("qwen2_moe", variant) for variant in decoder.VARIANTS), *(("emo", variant) for variant in EXPRESSIBLE_AS_EMO)],
)
def test_reading_gives_back_every_bit(format: str, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder.architecture(**decoder.VARIANTS[variant])
    weights = {name: w.to(dtype) for name, w in decoder.random_weights(model).items()}
    # the smallest numbers survive doubling and halving, too
    for weight in weights.values():
        weight.view(-1)[0] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    read = write(tmp_path / "out", format, model, weights, dtype=dtype)
    assert read.architecture == model
    assert read.dtype == dtype
    for name, weight in weights.items():
        assert torch.equal(read.weight(name), weight), name


def test_doubling_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = decoder.architecture()
    weights = decoder.random_weights(model)
    weights["model.layers.2.mlp.shared_expert.down_proj.weight"][3, 3] = 40000.0
    with pytest.raises(ValueError, match=r"layers\.2.*down_proj.*float16.*--dtype float32"):
        write(tmp_path / "out", "qwen2_moe", model, weights, dtype=torch.float16)


def test_a_constant_gate_of_an_earlier_release_is_no_gate_of_the_model(tmp_path: Path) -> None:
    model = decoder.architecture()
    weights = decoder.random_weights(model)
    write(tmp_path / "out", "qwen2_moe", model, weights)
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    gates = {name: torch.full_like(gate, 2.0**-20) for name, gate in stored.items() if "shared_expert_gate" in name}
    assert len(gates) == 3
    save_file(stored | gates, file, metadata={"format": "pt"})
    read = HuggingFaceFolder(tmp_path / "out")
    assert read.architecture == model
    down = "model.layers.1.mlp.shared_expert.down_proj.weight"
    assert torch.equal(read.weight(down), weights[down])


def test_the_released_format_weighs_as_its_authors_code_does(tmp_path: Path) -> None:
    """Their layer from their tensors: E + 1 experts, the last shared, a softmax over the others and one over it."""
    model = decoder.architecture(num_kv_heads=2)
    weights = decoder.random_weights(model)
    read = write(tmp_path / "out", "emo", model, weights)
    shared = read.config["num_shared_experts"]
    assert (read.config["num_experts"], read.config["num_experts_per_tok"], shared) == (7, 3, 1)
    x_TD = torch.randn(20, 32, dtype=torch.float64)
    part = {name: w.double() for name, w in decoder.of_layer(weights, 1).items()}
    mlp = "model.layers.1.mlp."
    theirs = {n.removeprefix(mlp): read.read(n).double() for n in read.shapes if mlp in n}
    logits_TE = x_TD @ theirs["gate.weight"].T
    routed = logits_TE[:, :-shared].softmax(-1).topk(3 - shared)
    always = logits_TE[:, -shared:].softmax(-1).topk(shared)
    out_TD = torch.zeros_like(x_TD)
    for t in range(20):
        for expert, weight in zip(routed.indices[t], routed.values[t], strict=True):
            out_TD[t] += weight * _their_mlp(theirs, int(expert), x_TD[t])
        for expert, weight in zip(always.indices[t], always.values[t], strict=True):
            out_TD[t] += weight * _their_mlp(theirs, int(expert) + 7 - shared, x_TD[t])
    torch.testing.assert_close(out_TD, decoder.experts(model, part, x_TD))


def _their_mlp(theirs: dict[str, Tensor], expert: int, x_D: Tensor) -> Tensor:
    gate, up, down = (theirs[f"experts.{expert}.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return down @ (torch.nn.functional.silu(gate @ x_D) * (up @ x_D))


RELEASED = {
    "model_type": "emo",
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "num_experts_per_layer": None,
    "num_shared_experts_per_layer": None,
    "always_active_experts": None,
    "norm_topk_prob": False,
    "output_router_logits": True,
}
"""config.json of the authors' 1B-active / 14B model."""


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Its tensors, as their code names them."""
    d, ffn = 2048, 1024
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100352, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (100352, d),
    }
    for layer in range(16):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
        shapes |= {f"{p}pre_{n}_layernorm.weight": (d,) for n in ("attention", "feedforward")}
        shapes[f"{p}mlp.gate.weight"] = (128, d)
        for e in range(128):
            shapes |= {f"{p}mlp.experts.{e}.{n}_proj.weight": (ffn, d) for n in ("gate", "up")}
            shapes[f"{p}mlp.experts.{e}.down_proj.weight"] = (d, ffn)
    return shapes


def test_the_released_1b14b_layout_both_ways() -> None:
    model = EMO.architecture(RELEASED, lambda part, values: False)
    assert (model.num_experts, model.top_k, model.shared_hidden) == (127, 7, 1024)
    entries = EMO.entries(model)
    assert {entry.name: entry.shape for entry in entries} == released_shapes()
    assert EMO.problems(model) == []
    shapes = released_shapes()
    weights = {e.weight: from_file(e, torch.empty(shapes[e.name], device="meta")) for e in entries}
    assert {name: tuple(w.shape) for name, w in weights.items()} == weight_shapes(model)
    for entry in entries:
        made = to_file(entry, weights.__getitem__, dtype=torch.float32)
        assert tuple(made.shape) == shapes[entry.name]
    written = EMO.config(model)
    differing = {name for name, value in RELEASED.items() if written.get(name) != value}
    assert differing == {"output_router_logits"}
    total = sum(torch.Size(shape).numel() for shape in weight_shapes(model).values())
    assert round(total / 1e9, 1) == 13.6
    gates = {e.shape for e in QWEN2_MOE.entries(model) if e.name.endswith("mlp.gate.weight")}
    assert gates == {(127, 2048)}


def test_a_foreign_qwen2_moe_keeps_its_gates_and_biases(tmp_path: Path) -> None:
    """Also: what transformers 5 holds in memory, fused, it saves as it was read."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(3)
    config = Qwen2MoeConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    theirs = Qwen2MoeForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    read = HuggingFaceFolder(tmp_path / "theirs")
    model = read.architecture
    assert (model.qkv_bias, model.shared_gate, model.dense_layers) == (True, True, (0, 2))
    weights = {name: read.weight(name) for name in weight_shapes(model)}
    expected = theirs(TOKENS[None]).logits[0].double()
    ours = decoder.logits(model, weights, TOKENS)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    again = write(tmp_path / "ours", "qwen2_moe", model, weights)
    for name in read.shapes:
        assert torch.equal(again.read(name), read.read(name)), name


def test_an_export_that_was_fine_tuned_keeps_what_training_made_of_gates_and_biases(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = decoder.architecture()
    write(tmp_path / "out", "qwen2_moe", model, decoder.random_weights(model))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.mlp.shared_expert_gate.weight"] += 0.25
    tensors["model.layers.0.self_attn.q_proj.bias"] -= 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    tuned = HuggingFaceFolder(tmp_path / "out").architecture
    assert (tuned.shared_gate, tuned.qkv_bias) == (True, True)


def test_a_model_whose_biases_are_zero_still_has_them(tmp_path: Path) -> None:
    model = decoder.architecture(qkv_bias=True, shared_gate=True)
    weights = decoder.random_weights(model)
    weights |= {n: torch.zeros_like(w) for n, w in weights.items() if "bias" in n or "_gate" in n}
    assert write(tmp_path / "out", "qwen2_moe", model, weights).architecture == model


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"renormalise": True}, "renormalised"),
        ({"shared_hidden": 24}, "as wide as a routed expert"),
        ({"qkv_bias": True}, "--add-qkv-bias"),
        ({"shared_gate": True}, "--moe-shared-expert-gate"),
        ({"head_dim": 16}, "--kv-channels"),
    ],
)
def test_what_the_released_format_cannot_express(overrides: dict[str, Any], reason: str) -> None:
    (problem,) = EMO.problems(decoder.architecture(**overrides))
    assert reason in problem


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("format", "change", "reason"),
    [
        ("emo", {"num_experts_per_layer": [7, 5, 7]}, r"number of experts.*\[7, 5, 7\]"),
        ("emo", {"num_shared_experts": 2}, "1 each in training"),
        ("emo", {"always_active_experts": [0]}, "always_active_experts"),
        ("emo", {"attention_bias": True}, "attention_bias"),
        ("emo", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("emo", {"head_dim": 16}, "head_dim"),
        ("emo", {"num_shared_experts_per_layer": [1, 0, 1]}, "num_shared_experts"),
        ("qwen2_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen2_moe", {"rope_parameters": LINEAR}, "rope_type"),
        # transformers computes rope_scaling if a config has both
        ("qwen2_moe", {"rope_parameters": PLAIN, "rope_scaling": LINEAR}, "rope_scaling"),
        ("qwen2_moe", {"rope_parameters": PLAIN, "rope_scaling": PLAIN | {"rope_theta": 2e4}}, "rope_scaling"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen2_moe", {"model_type": "mixtral"}, "model_type must be one of qwen2_moe, emo"),
        ("qwen2_moe", {"num_experts": None}, "top-k|must give|impossible"),
        ("qwen2_moe", {"num_experts": 5}, "have no place in the model"),
        ("qwen2_moe", {"vocab_size": 81}, r"embed_tokens.*\[81, 32\]; got \[80, 32\]"),
        ("qwen2_moe", {"num_hidden_layers": 4}, "tensors are missing"),
        ("qwen2_moe", {"num_experts_per_tok": 7}, "top-k must be in"),
    ],
)
def test_a_configuration_that_cannot_be_imported_says_why(
    format: str, change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = decoder.architecture()
    write(tmp_path / "out", format, model, decoder.random_weights(model))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=reason):
        HuggingFaceFolder(tmp_path / "out")


COUNTS = ("4", -1, 0, 2.5, True, 10**9, 10**30, [4], {})
NUMBERS = ("1e-6", -1.0, 0, True, 10**400, [1.0], {})
SWITCHES = ("false", 0, 1, [], {})
LISTS = (1, "ab", [0.5], ["0"], [[0]], [-1], [10**9], {"0": 1})
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "both": {
        "num_hidden_layers": COUNTS,
        "num_attention_heads": COUNTS,
        "num_key_value_heads": COUNTS,
        "hidden_size": COUNTS,
        "vocab_size": COUNTS,
        "num_experts": COUNTS,
        "num_experts_per_tok": COUNTS,
        "intermediate_size": COUNTS,
        "head_dim": COUNTS,
        "max_position_embeddings": ("48", -1, 0, 2.5, True, 10**30, [4], {}),
        "rms_norm_eps": NUMBERS,
        "rope_theta": NUMBERS,
        "rope_parameters": (1, "default", [1], {"rope_theta": "x"}),
        "norm_topk_prob": SWITCHES,
        "tie_word_embeddings": SWITCHES,
        "hidden_act": ("gelu", 1, [], {}),
        "model_type": (1, [], {}, ["qwen2_moe"]),
        "layer_types": (
            *(1, "full_attention", [], {}, [None] * 3),
            ["full_attention"] * 2,
            ["full_attention", "sliding_attention", "full_attention"],
        ),
    },
    "qwen2_moe": {
        "moe_intermediate_size": COUNTS,
        "shared_expert_intermediate_size": COUNTS,
        "decoder_sparse_step": ("1", -1, 0, 2.5, True, 10**30, []),
        "mlp_only_layers": LISTS,
        "emo_megatron": (1, "a", [1], {"shared_expert": 1}, {"qkv_bias": "no"}),
    },
    "emo": {
        "num_shared_experts": ("1", -1, 2, 0.5, True, []),
        "num_experts_per_layer": (*LISTS, [7, 7]),
        "num_shared_experts_per_layer": (*LISTS, [1, 1]),
        "dense_intermediate_size": COUNTS,
    },
}


@pytest.mark.parametrize("format", ["qwen2_moe", "emo"])
def test_a_field_of_another_type_or_size_is_told_with_the_file(format: str, tmp_path: Path) -> None:
    model = decoder.architecture(dense_layers=(1,), dense_hidden=20)
    write(tmp_path / "out", format, model, decoder.random_weights(model))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for field, values in (FIELDS["both"] | FIELDS[format]).items():
        for value in values:
            file.write_text(json.dumps(config | {field: value}))
            with pytest.raises(ValueError, match=str(tmp_path / "out")) as told:
                HuggingFaceFolder(tmp_path / "out")
            assert "\n" not in str(told.value), (field, value)
            # sizes that could be are told by the tensors that have others
            is_size = type(value) is int and 0 < value <= 2**31
            assert is_size or field in str(told.value), (field, value, str(told.value))


def test_a_tied_embedding_is_also_written_as_output_projection(tmp_path: Path) -> None:
    """SGLang does not tie the two, and had random values for the output projection."""
    model = decoder.architecture(tied=True)
    weights = decoder.random_weights(model)
    written = write(tmp_path / "out", "qwen2_moe", model, weights)
    embedding = weights["model.embed_tokens.weight"]
    assert torch.equal(written.read("lm_head.weight"), embedding)
    assert "lm_head.weight" not in write(tmp_path / "emo", "emo", model, weights).shapes
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    # folders of other programs have no copy; with a copy that differs, transformers does not tie the two
    save_file({name: t for name, t in stored.items() if name != "lm_head.weight"}, file, metadata={"format": "pt"})
    assert torch.equal(HuggingFaceFolder(tmp_path / "out").weight("model.embed_tokens.weight"), embedding)
    save_file(stored | {"lm_head.weight": torch.zeros_like(embedding)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        HuggingFaceFolder(tmp_path / "out")
