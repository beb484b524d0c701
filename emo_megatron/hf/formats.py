"""The Hugging Face formats that are known: the config.json and tensors of each, and what each cannot express.

`qwen2_moe`: stock transformers, vLLM and SGLang run it without remote code. EMO is exactly a `Qwen2MoeForCausalLM`.
That architecture scales its shared expert by sigmoid(gate . x), EMO by 1: a gate of zeros gives sigmoid(0) = 1/2, and
the shared down projection is stored doubled. Both are exact. Biases of q, k and v are written as zeros, because vLLM
always has them. `num_experts` and `num_experts_per_tok` count routed experts. A model without shared expert gets one of
zeros. llama.cpp computes the sigmoid as silu(x)/x, which is not a number at 0: for GGUF a gate of `TINY_GATE` moves the
shared expert's weight by less than 1e-5 and keeps it finite.

`emo`: the format that the authors released; its code is theirs and not shipped here. It counts the shared expert
among the experts: `num_experts` is E + 1, the shared expert is the last, and the gate has a row for it, which its
softmax over one logit makes irrelevant: zeros on export, dropped on import. Sources: arXiv 2605.06663 and its
repository's hf_trust_remote_code/emo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emo_megatron.finite import check_named_weight, first_bad
from emo_megatron.hf.config_file import (
    RECORD,
    SILU,
    common_config,
    common_sizes,
    record,
    switch,
    whole_number,
    whole_numbers,
)
from emo_megatron.hf.mapping import Architecture, tensors_of
from emo_megatron.mcore.unsupported import only, problems_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a format."""

    name: str
    shape: tuple[int, ...]
    weight: str | None
    """The weight that it holds, by its name in `mapping.weight_shapes`; None for a constant."""
    value: float = 0.0
    """What a constant is filled with."""
    scale: float = 1.0
    """A power of two that the weight is multiplied by, so that undoing it is exact."""
    padding_rows: int = 0
    """Rows of zeros after the weight's own."""


IsConstant = Callable[[str, set[float]], bool]
"""Whether every tensor of a folder whose name has a part is filled with one and the same of some values."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format, both ways."""

    model_type: str
    """Its name in config.json."""
    problems: Callable[[Architecture], list[str]]
    """What it cannot express of an architecture, one sentence each."""
    config: Callable[[Architecture], dict[str, Any]]
    """What config.json says of an architecture; token ids and dtype are the caller's."""
    entries: Callable[..., list[Entry]]
    """Its tensors, in the order of the model; `shared_gate_value` fills a shared gate that the model lacks."""
    architecture: Callable[[Mapping[str, Any], IsConstant], Architecture]
    """What a folder with this config.json holds; ValueError for what no `Architecture` expresses."""


def to_file(entry: Entry, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> Tensor:
    """The tensor of the format, of the weight that `read` gives; ValueError where it is not finite in this dtype."""
    if entry.weight is None:
        return torch.full(entry.shape, entry.value, dtype=dtype)
    weight = read(entry.weight)
    check_named_weight(entry.weight, weight, said=entry.name)
    tensor = weight.to(dtype)
    if entry.scale != 1.0:
        tensor = tensor * entry.scale
    if entry.padding_rows:
        tensor = torch.cat([tensor, tensor.new_zeros(entry.padding_rows, *tensor.shape[1:])])
    assert tuple(tensor.shape) == entry.shape, (entry, tensor.shape)
    can_overflow = tensor.dtype != weight.dtype or entry.scale != 1.0
    if can_overflow and first_bad(tensor) is not None:
        raise ValueError(
            f"{entry.name} does not fit {dtype}: its largest value is {float(weight.abs().max()):g}; "
            "export with --dtype float32"
        )
    return tensor.contiguous()


def from_file(entry: Entry, tensor: Tensor) -> Tensor:
    """The weight that a tensor of the format holds, which must be finite; the inverse of `to_file`."""
    if entry.padding_rows:
        tensor = tensor[: -entry.padding_rows]
    if entry.weight is not None:
        check_named_weight(entry.weight, tensor, said=entry.name)
    return tensor if entry.scale == 1.0 else tensor / entry.scale


def _head_dim_problems(architecture: Architecture) -> list[str]:
    """What is wrong where heads do not share out the hidden size."""
    a = architecture
    if a.head_dim * a.num_heads == a.hidden_size:
        return []
    return [
        f"a head must be hidden size / heads = {a.hidden_size}/{a.num_heads} wide (--kv-channels); got {a.head_dim}: "
        "vLLM takes no other for this architecture"
    ]


TINY_GATE = 2.0**-20
"""A shared gate that is not zero, for llama.cpp."""
_QWEN_EXPECTED = (SILU, only("use_sliding_window", False, None, why="every position sees all before it"))


def _qwen_config(architecture: Architecture) -> dict[str, Any]:
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


def _qwen_entries(architecture: Architecture, *, shared_gate_value: float = 0.0) -> list[Entry]:
    """The tensors of the format: each weight by its name, and constants where the model has none."""
    found = []
    for tensor in tensors_of(architecture):
        value = (shared_gate_value if tensor.row.needs == "shared_gate" else 0.0) or tensor.row.fill or 0.0
        # where the gate halves
        scale = 2.0 if tensor.row.kind == "doubled" and not architecture.shared_gate else 1.0
        for name, shape in tensor.weights.items():
            weight = None if tensor.is_constant else name
            found.append(Entry(name=name, shape=shape, weight=weight, value=value, scale=scale))
    return found


def _qwen_architecture(config: Mapping[str, Any], is_constant: IsConstant) -> Architecture:
    if problems := problems_of(_QWEN_EXPECTED, config, name_of=str):
        raise ValueError("; ".join(problems))
    sizes = common_sizes(config)
    layers = range(sizes["num_layers"])
    step = whole_number(config, "decoder_sparse_step", default=1)
    dense = {layer for layer in layers if (layer + 1) % step}
    dense |= set(whole_numbers(config, "mlp_only_layers", below=len(layers)))
    noted = record(config, RECORD)

    def has(what: str, part: str, *values: float) -> bool:
        """Whether the export noted it, or its tensors are not the constant of a model without it."""
        return switch(noted, what, of=RECORD) or not is_constant(part, set(values))

    has_shared = has("shared_expert", "shared_expert.", 0.0)
    return Architecture(
        **sizes,
        num_experts=whole_number(config, "num_experts"),
        top_k=whole_number(config, "num_experts_per_tok"),
        expert_hidden=whole_number(config, "moe_intermediate_size"),
        shared_hidden=whole_number(config, "shared_expert_intermediate_size") if has_shared else 0,
        dense_layers=tuple(sorted(dense)),
        dense_hidden=whole_number(config, "intermediate_size") if dense else 0,
        qkv_bias=has("qkv_bias", "_proj.bias", 0.0),
        shared_gate=has_shared and has("shared_gate", "shared_expert_gate.", 0.0, TINY_GATE),
    )


QWEN2_MOE = Format(
    model_type="qwen2_moe",
    problems=_head_dim_problems,
    config=_qwen_config,
    entries=_qwen_entries,
    architecture=_qwen_architecture,
)


_EMO_EXPECTED = (
    SILU,
    only("attention_bias", False, None, why="there the output projection has a bias, too"),
    only("dense_mlp_bias", False, None, why="MLPs in Megatron's models here have no bias"),
    only("always_active_experts", None, [], why="their weight is a probability"),
    only("always_active_experts_per_layer", None, [], why="their weight is a probability"),
    only("num_shared_experts", 0, 1, None, why="more weigh 1 in total there and 1 each in training"),
)
_EMO_NAMES = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp.shared_expert.": "mlp.experts.{last}.",
}
"""Qwen2-MoE's names -> those of this format."""


def _emo_problems(architecture: Architecture) -> list[str]:
    a = architecture
    problems = _head_dim_problems(a)
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


def _emo_config(architecture: Architecture) -> dict[str, Any]:
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


def _emo_entries(architecture: Architecture, *, shared_gate_value: float = 0.0) -> list[Entry]:
    if shared_gate_value:
        raise ValueError("the shared expert has no gate in this format: drop --nonzero-shared-gate")
    found = []
    for entry in _qwen_entries(architecture):
        # no constants: what the model has not, the format has not
        if entry.weight is None:
            continue
        name, shape, padding = entry.name, entry.shape, 0
        for theirs, ours in _EMO_NAMES.items():
            name = name.replace(theirs, ours.format(last=architecture.num_experts))
        if architecture.shared_hidden and name.endswith(".mlp.gate.weight"):
            shape, padding = (shape[0] + 1, shape[1]), 1
        found.append(dataclasses.replace(entry, name=name, shape=shape, scale=1.0, padding_rows=padding))
    return found


def _emo_architecture(config: Mapping[str, Any], is_constant: IsConstant) -> Architecture:
    problems = problems_of(_EMO_EXPECTED, config, name_of=str)
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


EMO = Format(
    model_type="emo", problems=_emo_problems, config=_emo_config, entries=_emo_entries, architecture=_emo_architecture
)
FORMATS: dict[str, Format] = {format.model_type: format for format in (QWEN2_MOE, EMO)}
"""By model_type."""
