"""The model that `hf.Architecture` describes, straight from its definition, in float64; and random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from emo_megatron.hf.mapping import Architecture, weight_shapes

SMALL = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "num_experts": 6,
    "top_k": 2,
    "expert_hidden": 12,
    "shared_hidden": 12,
    "rope_theta": 500000.0,
    "max_positions": 48,
    "norm_eps": 1e-6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "grouped queries, renormalised": {"num_kv_heads": 2, "renormalise": True},
    "no shared expert": {"shared_hidden": 0, "num_kv_heads": 1},
    "no shared expert, renormalised": {"shared_hidden": 0, "renormalise": True},
    "wide shared expert, dense layers": {"shared_hidden": 24, "dense_layers": (0, 2), "dense_hidden": 20},
    "biases and a shared gate": {"qkv_bias": True, "shared_gate": True, "num_kv_heads": 2},
    "tied, as many experts as a token uses": {"tied": True, "top_k": 6},
}


def architecture(**overrides: Any) -> Architecture:
    return Architecture(**(SMALL | overrides))


def random_weights(model: Architecture, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough that routers decide and biases and norms matter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in weight_shapes(model).items()
    }


def write_folder(
    folder: Path,
    format: str = "qwen2_moe",
    *,
    model: Architecture | None = None,
    weights: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Path:
    """A Hugging Face folder of a model; of random weights, if none are given."""
    from emo_megatron.hf import folder as folders

    model = model or architecture()
    read = (weights or random_weights(model)).__getitem__
    folder.mkdir(parents=True)
    options = {"dtype": torch.float32, "extra_config": {}} | options
    folders.write_folder(folder, format=folders.FORMATS[format], architecture=model, read=read, **options)
    return folder


def logits(model: Architecture, weights: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    """[T, V] float64."""
    w = {name: weight.double() for name, weight in weights.items()}
    x_TD = w["model.embed_tokens.weight"][tokens_T]
    for layer in range(model.num_layers):
        part = of_layer(w, layer)
        x_TD = x_TD + _attention(model, part, _norm(model, x_TD, part["input_layernorm.weight"]))
        h_TD = _norm(model, x_TD, part["post_attention_layernorm.weight"])
        is_dense = layer in model.dense_layers
        x_TD = x_TD + (_mlp(part, "mlp", h_TD) if is_dense else experts(model, part, h_TD))
    output_VD = w["model.embed_tokens.weight" if model.tied else "lm_head.weight"]
    return _norm(model, x_TD, w["model.norm.weight"]) @ output_VD.T


def of_layer(weights: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of a layer, by their names in it."""
    prefix = f"model.layers.{layer}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _norm(model: Architecture, x_TD: Tensor, weight_D: Tensor) -> Tensor:
    return x_TD * (x_TD.pow(2).mean(-1, keepdim=True) + model.norm_eps).rsqrt() * weight_D


def _mlp(part: dict[str, Tensor], name: str, x_TD: Tensor) -> Tensor:
    gate, up, down = (part[f"{name}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
    return (silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T


def _attention(model: Architecture, part: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    def heads(name: str) -> Tensor:
        projected = x_TD @ part[f"self_attn.{name}_proj.weight"].T + part.get(f"self_attn.{name}_proj.bias", 0.0)
        return projected.view(len(x_TD), -1, model.head_dim).transpose(0, 1)

    share = model.num_heads // model.num_kv_heads
    q, k = (_rotate(model, heads(name)) for name in ("q", "k"))
    k, v = (t.repeat_interleave(share, dim=0) for t in (k, heads("v")))
    scores = q @ k.transpose(1, 2) / model.head_dim**0.5
    is_future = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(is_future, float("-inf")).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(len(x_TD), -1) @ part["self_attn.o_proj.weight"].T


def _rotate(model: Architecture, heads_HTd: Tensor) -> Tensor:
    half = model.head_dim // 2
    frequency = model.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(heads_HTd.shape[1])[:, None] * frequency
    a, b = heads_HTd[..., :half], heads_HTd[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def experts(model: Architecture, part: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    best = (x_TD @ part["mlp.gate.weight"].T).softmax(-1).topk(model.top_k)
    gates = best.values / best.values.sum(-1, keepdim=True) if model.renormalise else best.values
    out_TD = torch.zeros_like(x_TD)
    for token, (chosen, weights) in enumerate(zip(best.indices, gates, strict=True)):
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            out_TD[token] += weight * _mlp(part, f"mlp.experts.{expert}", x_TD[token])
    if not model.shared_hidden:
        return out_TD
    weight_T1 = (x_TD @ part["mlp.shared_expert_gate.weight"].T).sigmoid() if model.shared_gate else 1.0
    return out_TD + weight_T1 * _mlp(part, "mlp.shared_expert", x_TD)
