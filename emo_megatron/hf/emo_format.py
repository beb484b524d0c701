"""The authors' released format, `model_type` emo, whose code is theirs and not shipped here.

It counts the shared expert among the experts: `num_experts` is E + 1, the shared expert is the last, and the gate has a
row for it, which its softmax over one logit makes irrelevant: zeros on export, dropped on import. Sources: arXiv
2605.06663 and its repository's hf_trust_remote_code/emo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emo_megatron.hf import qwen2_moe
from emo_megatron.hf.architecture import Architecture
from emo_megatron.hf.config_file import (
    RECORD,
    SILU,
    common_config,
    common_sizes,
    head_dim_problems,
    whole_number,
    whole_numbers,
)
from emo_megatron.hf.formats import Entry, Format, IsConstant
from emo_megatron.mcore.unsupported import only, problems_of

EXPECTED = (
    SILU,
    only("attention_bias", False, None, why="there the output projection has a bias, too"),
    only("dense_mlp_bias", False, None, why="MLPs in Megatron's models here have no bias"),
    only("always_active_experts", None, [], why="their weight is a probability"),
    only("always_active_experts_per_layer", None, [], why="their weight is a probability"),
    only("num_shared_experts", 0, 1, None, why="more weigh 1 in total there and 1 each in training"),
)
RENAMED = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp.shared_expert.": "mlp.experts.{last}.",
}
"""Qwen2-MoE's names -> those of this format."""


def _problems(architecture: Architecture) -> list[str]:
    a = architecture
    problems = head_dim_problems(a)
    if a.shared_hidden not in (0, a.expert_hidden):
        problems.append(
            f"the shared expert must be as wide as a routed one ({a.expert_hidden}, "
            f"--moe-shared-expert-intermediate-size); got {a.shared_hidden}: several shared experts weigh "
            "1 in total there and 1 each in training"
        )
    if a.shared_gate:
        problems.append("the shared expert must have no gate (--moe-shared-expert-gate)")
    if a.qkv_bias:
        problems.append("q, k and v must have no bias (--add-qkv-bias): there the output projection has one too")
    if a.renormalise and a.shared_hidden:
        problems.append(
            "with a shared expert the top-k must not be renormalised (--moe-router-pre-softmax): the "
            "authors' code refuses it"
        )
    return problems


def _config(architecture: Architecture) -> dict[str, Any]:
    a = architecture
    num_shared = int(a.shared_hidden > 0)
    config = {
        "architectures": ["EmoForCausalLM"],
        "model_type": "emo",
        "auto_map": {
            "AutoConfig": "configuration_emo.EmoConfig",
            "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM",
        },
        **common_config(a),
        "intermediate_size": a.expert_hidden,
        "num_experts": a.num_experts + num_shared,
        "num_experts_per_tok": a.top_k + num_shared,
        "num_shared_experts": num_shared,
        "attention_bias": False,
        "rope_scaling": None,
        # true in the released configuration, where it breaks batched generation
        "output_router_logits": False,
        RECORD: {},
    }
    if a.dense_layers:
        is_sparse = [layer in a.moe_layers for layer in range(a.num_layers)]
        config["num_experts_per_layer"] = [config["num_experts"] * sparse for sparse in is_sparse]
        config["num_shared_experts_per_layer"] = [num_shared * sparse for sparse in is_sparse]
        config["dense_intermediate_size"] = a.dense_hidden
    return config


def _entries(architecture: Architecture, *, shared_gate_value: float = 0.0) -> list[Entry]:
    if shared_gate_value:
        raise ValueError("the shared expert has no gate in this format: drop --nonzero-shared-gate")
    found = []
    for entry in qwen2_moe.entries(architecture):
        # no constants: what the model has not, the format has not
        if entry.weight is None:
            continue
        name, shape, padding = entry.name, entry.shape, 0
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours.format(last=architecture.num_experts))
        if architecture.shared_hidden and name.endswith(".mlp.gate.weight"):
            shape, padding = (shape[0] + 1, shape[1]), 1
        found.append(dataclasses.replace(entry, name=name, shape=shape, scale=1.0, padding_rows=padding))
    return found


def _architecture(config: Mapping[str, Any], is_constant: IsConstant) -> Architecture:
    problems = problems_of(EXPECTED, config, name_of=str)
    num_shared = whole_number(config, "num_shared_experts", least=0, default=0)
    num_layers, num_all = whole_number(config, "num_hidden_layers"), whole_number(config, "num_experts")
    counts = _per_layer(config, "num_experts", num_layers=num_layers, otherwise=num_all)
    sparse = {count for count in counts if count}
    if len(sparse) > 1:
        problems.append(f"every sparse layer must have as many experts (Megatron has one --num-experts); got {counts}")
    shared_counts = _per_layer(config, "num_shared_experts", num_layers=num_layers, otherwise=num_shared)
    if {n for n, all_of in zip(shared_counts, counts, strict=True) if all_of} - {num_shared}:
        problems.append(f"every sparse layer must have num_shared_experts {num_shared}; got {shared_counts}")
    if problems:
        raise ValueError("; ".join(problems))
    dense = tuple(layer for layer, count in enumerate(counts) if count == 0)
    return Architecture(
        **common_sizes(config),
        num_experts=max(sparse, default=num_shared) - num_shared,
        top_k=whole_number(config, "num_experts_per_tok") - num_shared,
        expert_hidden=whole_number(config, "intermediate_size"),
        shared_hidden=whole_number(config, "intermediate_size") if num_shared else 0,
        dense_layers=dense,
        dense_hidden=whole_number(config, "dense_intermediate_size") if dense else 0,
    )


def _per_layer(config: Mapping[str, Any], name: str, *, num_layers: int, otherwise: int) -> list[int]:
    counts = whole_numbers(config, f"{name}_per_layer") or [otherwise] * num_layers
    if len(counts) != num_layers:
        raise ValueError(f"{name}_per_layer must have an entry for each of {num_layers} layers; got {len(counts)}")
    return counts


EMO = Format(model_type="emo", problems=_problems, config=_config, entries=_entries, architecture=_architecture)
