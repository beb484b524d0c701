"""emo_megatron.hf.gguf: the file holds the model, bit for bit and as llama.cpp's source computes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support import decoder
from support.words import END, FIRST, adds_first, split_by, write_bytes
from torch import Tensor
from torch.nn.functional import silu

from emo_megatron.hf import gguf as written
from emo_megatron.hf.gguf_vocabulary import RULES, Vocabulary
from emo_megatron.hf.mapping import Architecture
from emo_megatron.hf.tokenizer import Tokenizer

TOKENS = torch.arange(40) * 7 % 80
VARIANTS: dict[str, dict[str, Any]] = {
    name: values for name, values in decoder.VARIANTS.items() if not {"dense_layers", "shared_gate"} & values.keys()
} | {
    "biases": {"qkv_bias": True, "num_kv_heads": 2},
    # 32 is also the hidden size: only one of the two axes is filled up
    "a shared expert as wide as the model": {"shared_hidden": 32},
    "one expert": {"num_experts": 1, "top_k": 1},
}


def write(path: Path, model: Architecture, weights: Mapping[str, Tensor], **options: Any) -> Path:
    given = {"dtype": torch.float32, "vocabulary": None, "name": "tiny"} | options
    written.write(path, architecture=model, read=weights.__getitem__, **given)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_gives_back_every_bit(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder.architecture(**VARIANTS[variant])
    weights = {name: w.to(dtype) for name, w in decoder.random_weights(model).items()}
    read = written.GGUFFile(write(tmp_path / "model.gguf", model, weights, dtype=dtype))
    assert read.dtype == dtype
    stored = read.architecture
    assert stored.shared_hidden == max(12, -(-model.shared_hidden // 12) * 12)
    sizes = ("vocab_size", "num_layers", "num_kv_heads", "num_experts", "top_k", "renormalise", "qkv_bias", "head_dim")
    assert [getattr(stored, name) for name in sizes] == [getattr(model, name) for name in sizes]
    for name, weight in weights.items():
        found = read.weight(name)
        # a shared expert is filled up with zeros
        box = tuple(slice(0, size) for size in weight.shape)
        assert torch.equal(found[box], weight), name
        assert found.count_nonzero() == weight.count_nonzero(), name
    if model.tied:
        assert torch.equal(read.weight("lm_head.weight"), weights["model.embed_tokens.weight"])
    if not model.shared_hidden:
        assert not read.weight("model.layers.0.mlp.shared_expert.up_proj.weight").any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_model(variant: str, tmp_path: Path) -> None:
    """From the raw tensors, by the names and the equations in llama.cpp's src/models/bailingmoe.cpp."""
    model = decoder.architecture(**VARIANTS[variant])
    weights = decoder.random_weights(model)
    path = write(tmp_path / "model.gguf", model, weights)
    expected = decoder.logits(model, weights, TOKENS)
    torch.testing.assert_close(bailingmoe(path, TOKENS), expected, rtol=1e-5, atol=1e-5)


def bailingmoe(path: Path, tokens_T: Tensor) -> Tensor:
    """[T, V] float64."""
    reader = gguf.GGUFReader(path)
    of = {name.removeprefix("bailingmoe."): field.contents() for name, field in reader.fields.items()}
    t = {tensor.name: torch.from_numpy(np.array(tensor.data)).double() for tensor in reader.tensors}
    heads, kv_heads, width = of["attention.head_count"], of["attention.head_count_kv"], of["rope.dimension_count"]
    epsilon, is_future = of["attention.layer_norm_rms_epsilon"], torch.ones(40, 40, dtype=torch.bool).triu(1)
    assert of["leading_dense_block_count"] == 0
    assert of["expert_weights_scale"] == 1.0

    def norm(x_TD: Tensor, name: str) -> Tensor:
        return x_TD * (x_TD.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * t[f"{name}.weight"]

    def rotate(x_HTd: Tensor) -> Tensor:
        """LLAMA_ROPE_TYPE_NORM: pairs of neighbours."""
        frequency = of["rope.freq_base"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(len(tokens_T))[:, None] * frequency)
        pairs = torch.view_as_complex(x_HTd.reshape(*x_HTd.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x_TD = t["token_embd.weight"][tokens_T]
    for layer in range(of["block_count"]):
        b = f"blk.{layer}."
        h_TD = norm(x_TD, f"{b}attn_norm")
        q, k, v = (
            (h_TD @ t[f"{b}attn_{n}.weight"].T + t.get(f"{b}attn_{n}.bias", 0.0)).view(40, -1, width).transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (s.repeat_interleave(heads // kv_heads, dim=0) for s in (k, v))
        mixed = (q @ k.transpose(1, 2) / width**0.5).masked_fill(is_future, -torch.inf).softmax(-1) @ v
        x_TD = x_TD + mixed.transpose(0, 1).reshape(40, -1) @ t[f"{b}attn_output.weight"].T
        h_TD = norm(x_TD, f"{b}ffn_norm")
        best = (h_TD @ t[f"{b}ffn_gate_inp.weight"].T).softmax(-1).topk(of["expert_used_count"])
        gates = best.values / best.values.sum(-1, keepdim=True) if of["expert_weights_norm"] else best.values
        gate, up, down = (t[f"{b}ffn_{n}_exps.weight"][best.indices] for n in ("gate", "up", "down"))
        each = silu(torch.einsum("tkfd,td->tkf", gate, h_TD)) * torch.einsum("tkfd,td->tkf", up, h_TD)
        routed = torch.einsum("tkdf,tkf,tk->td", down, each, gates)
        gate, up, down = (t[f"{b}ffn_{n}_shexp.weight"] for n in ("gate", "up", "down"))
        assert gate.shape[0] == of["expert_shared_count"] * of["expert_feed_forward_length"]
        x_TD = x_TD + routed + (silu(h_TD @ gate.T) * (h_TD @ up.T)) @ down.T
    return norm(x_TD, "output_norm") @ t["output.weight"].T


def test_models_that_llama_cpp_cannot_compute_are_named() -> None:
    plain = decoder.architecture()
    assert written.problems(plain) == []
    for flag, changes in {
        "--moe-layer-freq": decoder.VARIANTS["wide shared expert, dense layers"],
        "--moe-shared-expert-gate": {"shared_gate": True},
        "--kv-channels": {"head_dim": 16},
    }.items():
        (problem,) = written.problems(decoder.architecture(**changes))
        assert flag in problem
        assert "\n" not in problem


def test_values_that_do_not_fit_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = decoder.architecture()
    for value, said in ((70000.0, "--dtype float32"), (float("nan"), "layer 2, expert 3")):
        weights = decoder.random_weights(model)
        weights["model.layers.1.mlp.experts.3.up_proj.weight"][1, 1] = value
        with pytest.raises(ValueError, match=said):
            write(tmp_path / "model.gguf", model, weights, dtype=torch.float16)


def byte_level(folder: Path, **options: Any) -> Tokenizer:
    return Tokenizer(write_bytes(folder, **options))


def vocabulary_of(tokenizer: Tokenizer, *, rows: int = 320) -> Vocabulary:
    return Vocabulary(tokenizer, rows=rows)


def test_the_file_holds_the_tokenizer(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = byte_level(tmp_path / "tokenizer", config={"chat_template": template})
    model = decoder.architecture(vocab_size=320)
    path = tmp_path / "model.gguf"
    write(path, model, decoder.random_weights(model), vocabulary=vocabulary_of(tokenizer))
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    assert (of["model"], of["pre"]) == ("gpt2", "gpt-2")
    assert fields["tokenizer.chat_template"] == template
    stored = tokenizer.definition
    assert stored is not None
    assert of["merges"] == [" ".join(merge) for merge in stored["model"]["merges"]]
    texts, kinds = of["tokens"], of["token_type"]
    assert len(texts) == len(kinds) == len(set(texts)) == 320
    count = len(tokenizer)
    by_text = stored["model"]["vocab"] | {END: 0, FIRST: 1, "<tool>": count - 1}
    assert texts[:count] == sorted(by_text, key=lambda text: by_text[text])
    # of llama.cpp: 1 normal, 3 control, 4 user defined, 5 unused
    assert kinds == [3, 3, *[1] * (count - 3), 4, *[5] * (320 - count)]
    assert (of["bos_token_id"], of["eos_token_id"]) == (1, 0)
    assert (of["add_bos_token"], of["add_eos_token"]) == (False, False)


def test_the_file_says_which_tokens_the_tokenizer_adds(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(byte_level(tmp_path / "tokenizer", change=adds_first))
    model = decoder.architecture(vocab_size=320)
    path = write(tmp_path / "model.gguf", model, decoder.random_weights(model), vocabulary=vocabulary)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_eos_token"].contents() is False


@pytest.mark.parametrize(("regex", "ignores_merges"), RULES)
def test_the_rule_for_words_has_the_name_of_llama_cpp(regex: str, ignores_merges: bool, tmp_path: Path) -> None:
    def change(stored: dict[str, Any]) -> None:
        split_by(regex)(stored)
        stored["model"]["ignore_merges"] = ignores_merges
        stored["normalizer"] = {"type": "NFC"}

    assert vocabulary_of(byte_level(tmp_path / "tokenizer", change=change)).rule == RULES[regex, ignores_merges]


BAD = {
    "WordLevel": lambda s: s.update(model={"type": "WordLevel", "vocab": {END: 0, FIRST: 1, "a": 2}, "unk_token": "a"}),
    "bytes": lambda s: s["model"].update(byte_fallback=True),
    "dropout": lambda s: s["model"].update(dropout=0.1),
    "end_of_word_suffix": lambda s: s["model"].update(end_of_word_suffix="</w>"),
    "Lowercase": lambda s: s.update(normalizer={"type": "Lowercase"}),
    "ignore_merges True": lambda s: s["model"].update(ignore_merges=True),
    "add_prefix_space": lambda s: s["pre_tokenizer"].update(add_prefix_space=True),
    "Whitespace": lambda s: s.update(pre_tokenizer={"type": "Whitespace"}),
    "null": lambda s: s.update(pre_tokenizer=None),
    "Regex": split_by(r"\p{L}+|\s+"),
    "lstrip": lambda s: s["added_tokens"][2].update(lstrip=True),
    "single_word": lambda s: s["added_tokens"][2].update(single_word=True),
    "bos_token": lambda s: adds_first(s, before=(END, FIRST)),
}


@pytest.mark.parametrize("named", BAD)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(named: str, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer", change=BAD[named])
    with pytest.raises(ValueError, match=r"--format gguf") as error:
        vocabulary_of(tokenizer)
    said = str(error.value)
    assert "--tokenizer" in said
    assert str(tmp_path / "tokenizer") in said
    assert named in said or named == "null"
    assert "\n" not in said


def test_a_tokenizer_without_end_or_with_too_many_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eos_token"):
        vocabulary_of(byte_level(tmp_path / "no end", config={"eos_token": None}))
    # a first token that is not bos_token
    tokenizer = byte_level(tmp_path / "no first", change=adds_first, config={"bos_token": None})
    with pytest.raises(ValueError, match="bos_token"):
        vocabulary_of(tokenizer)
    tokenizer = byte_level(tmp_path / "large")
    with pytest.raises(ValueError, match=f"{len(tokenizer) - 1}.*embedding|embedding.*{len(tokenizer) - 1}"):
        vocabulary_of(tokenizer, rows=len(tokenizer) - 1)
