"""Qwen2-MoE, which stock transformers, vLLM and SGLang run without remote code.

EMO is exactly a `Qwen2MoeForCausalLM`. That architecture scales its shared expert by sigmoid(gate . x), EMO by 1: a
gate of zeros gives sigmoid(0) = 1/2, and the shared down projection is stored doubled. Both are exact. Biases of q, k
and v are written as zeros, because vLLM always has them. `num_experts` and `num_experts_per_tok` count routed experts.
A model without shared expert gets one of zeros.

llama.cpp computes the sigmoid as silu(x)/x, which is not a number at 0: for GGUF a gate of `TINY_GATE` moves the
shared expert's weight by less than 1e-5 and keeps it finite.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch

from emo_megatron.hf.architecture import ATTENTION, MLP, Architecture
from emo_megatron.hf.entries import Entry
from emo_megatron.hf.fields import record, switch, whole_number, whole_numbers
from emo_megatron.hf.formats import (
    RECORD,
    Format,
    Stored,
    common_config,
    common_sizes,
    expect,
    head_dim_problems,
    plain_entries,
    renamer,
)

TINY_GATE = 2.0**-20
"""A shared gate that is not zero, for llama.cpp."""

_RENAME = renamer(
    {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "router": "mlp.gate",
        "shared_gate": "mlp.shared_expert_gate",
        "shared": "shared_expert",
        "dense": "",
    }
)
_HALVED = re.compile(r".*\.mlp\.shared_expert\.down_proj\.weight")


def _problems(architecture: Architecture) -> list[str]:
    return head_dim_problems(architecture)


def _config(architecture: Architecture) -> dict[str, Any]:
    a = architecture
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **common_config(a),
        # of dense layers only
        "intermediate_size": a.dense_hidden or a.expert_hidden * a.top_k,
        "moe_intermediate_size": a.expert_hidden,
        "shared_expert_intermediate_size": a.shared_hidden or a.expert_hidden,
        "num_experts": a.num_experts,
        "num_experts_per_tok": a.top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(a.dense_layers),
        "qkv_bias": True,
        "use_sliding_window": False,
        "output_router_logits": False,
        RECORD: {"qkv_bias": a.qkv_bias, "shared_expert": a.shared_hidden > 0, "shared_gate": a.shared_gate},
    }


def _entries(architecture: Architecture, *, shared_gate_value: float = 0.0) -> list[Entry]:
    a = architecture
    found = []
    for entry in plain_entries(a, _RENAME):
        is_doubled = not a.shared_gate and _HALVED.fullmatch(entry.name)
        found.append(dataclasses.replace(entry, scale=2.0) if is_doubled else entry)
        if entry.weight is not None and entry.weight.endswith(".router"):
            mlp = entry.name.removesuffix("gate.weight")
            found += _constants(a, mlp, shared_gate_value)
    if not a.qkv_bias:
        wide, narrow = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        for layer in range(a.num_layers):
            for name, width in zip(ATTENTION, (wide, narrow, narrow), strict=True):
                bias = f"model.layers.{layer}.self_attn.{name}_proj.bias"
                found.append(Entry(name=bias, shape=(width,), weight=None))
    return found


def _constants(architecture: Architecture, mlp: str, shared_gate_value: float) -> list[Entry]:
    """What the format has in a sparse layer and the model has not."""
    a = architecture
    found = []
    if not a.shared_gate:
        gate = mlp + "shared_expert_gate.weight"
        found.append(Entry(name=gate, shape=(1, a.hidden_size), weight=None, value=shared_gate_value))
    if not a.shared_hidden:
        # an MLP of zeros, as wide as an expert: a width of 0 is not loaded everywhere
        wide, narrow = (a.expert_hidden, a.hidden_size), (a.hidden_size, a.expert_hidden)
        for name, shape in zip(MLP, (wide, wide, narrow), strict=True):
            found.append(Entry(name=f"{mlp}shared_expert.{name}_proj.weight", shape=shape, weight=None))
    return found


def _architecture(stored: Stored) -> Architecture:
    config = stored.config
    problems = expect(config, hidden_act="silu", use_sliding_window=False)
    if problems:
        raise ValueError("; ".join(problems))
    sizes = common_sizes(config)
    step = whole_number(config, "decoder_sparse_step", default=1)
    dense = {layer for layer in range(sizes["num_layers"]) if (layer + 1) % step}
    dense |= set(whole_numbers(config, "mlp_only_layers", default=[], below=sizes["num_layers"]))
    noted = record(config, RECORD)
    has_shared = switch(noted, "shared_expert", default=False, of=RECORD) or not _is_constant(
        stored, "shared_expert.", {0.0}
    )
    has_gate = has_shared and (
        switch(noted, "shared_gate", default=False, of=RECORD)
        or not _is_constant(stored, "shared_expert_gate.", {0.0, TINY_GATE})
    )
    return Architecture(
        **sizes,
        num_experts=whole_number(config, "num_experts"),
        top_k=whole_number(config, "num_experts_per_tok"),
        expert_hidden=whole_number(config, "moe_intermediate_size"),
        shared_hidden=whole_number(config, "shared_expert_intermediate_size") if has_shared else 0,
        dense_layers=tuple(sorted(dense)),
        dense_hidden=whole_number(config, "intermediate_size") if dense else 0,
        qkv_bias=switch(noted, "qkv_bias", default=False, of=RECORD) or not _is_constant(stored, "_proj.bias", {0.0}),
        shared_gate=has_gate,
    )


def _is_constant(stored: Stored, part: str, values: set[float]) -> bool:
    """Whether every tensor whose name has this part is filled with one and the same of these values."""
    seen: set[float] = set()
    for name in stored.shapes:
        if part not in name:
            continue
        tensor = stored.read(name).to(torch.float32)
        low, high = (float(v) for v in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        seen |= {low, high}
        if not seen <= values or len(seen) > 1:
            return False
    return True


QWEN2_MOE = Format(
    model_type="qwen2_moe", problems=_problems, config=_config, entries=_entries, architecture=_architecture
)
