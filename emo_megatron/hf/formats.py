"""The supported Hugging Face formats: config.json, tensors and limits of each format.

`qwen2_moe`: stock transformers, vLLM and SGLang run this format without remote code. An EMO model is exactly a
`Qwen2MoeForCausalLM`. Qwen2-MoE multiplies the shared expert by sigmoid(gate . x), and EMO multiplies by 1. Therefore
the gate is written as zeros, with sigmoid(0) = 1/2, and the shared down projection is stored doubled. Both are exact.
Biases of q, k and v are written as zeros, because vLLM always has these biases. `num_experts` and `num_experts_per_tok`
count routed experts. A model without shared expert gets a shared expert of zeros. A model with tied embeddings is
written with a copy of the embedding as the output projection, because SGLang does not tie the two.

`emo`: the format that the authors released. The authors' modelling code is not part of this package. The format counts
the shared expert: `num_experts` is E + 1, and the shared expert is the last expert. The gate has a row for the shared
expert. A softmax over this single logit is always 1, so the row has no effect: it is written as zeros and dropped on
import. Sources: arXiv 2605.06663 and hf_trust_remote_code/emo in the paper's repository.
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
    """The stored weight, by its name in `mapping.weight_shapes`; None for a constant."""
    value: float = 0.0
    """The value of a constant."""
    scale: float = 1.0
    """The weight is multiplied by this power of two; the division on import is exact."""
    padding_rows: int = 0
    """Rows of zeros after the rows of the weight."""


IsConstant = Callable[[str, set[float]], bool]
"""(part, values): whether all tensors with `part` in their names hold a single value, which is one of `values`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format, for export and import."""

    model_type: str
    """Name of the format in config.json."""
    problems: Callable[[Architecture], list[str]]
    """Properties of an architecture that the format cannot express, one sentence each."""
    config: Callable[[Architecture], dict[str, Any]]
    """The fields of config.json for an architecture; the caller adds token ids and dtype."""
    entries: Callable[[Architecture], list[Entry]]
    """The tensors of a model, in the order of the model."""
    name: Callable[[str, Architecture], str]
    """The name in this format of a weight, or of a name with `*` in `mapping.TABLE`."""
    architecture: Callable[[Mapping[str, Any], IsConstant], Architecture]
    """The architecture in a folder with this config.json; ValueError if no `Architecture` can express the model."""


def to_file(entry: Entry, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> Tensor:
    """The tensor to store, made from the weight that `read` returns; ValueError if it is not finite in this dtype."""
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
            f"{entry.name} does not fit into {dtype}; the largest absolute value is {float(weight.abs().max()):g}: "
            "export with --dtype float32"
        )
    return tensor.contiguous()


def from_file(entry: Entry, tensor: Tensor) -> Tensor:
    """The weight in a stored tensor; the inverse of `to_file`. NotFiniteError if a value is not finite."""
    if entry.padding_rows:
        tensor = tensor[: -entry.padding_rows]
    if entry.weight is not None:
        check_named_weight(entry.weight, tensor, said=entry.name)
    return tensor if entry.scale == 1.0 else tensor / entry.scale


def head_dim_problems(architecture: Architecture, *, why: str) -> list[str]:
    """A problem if heads * head width is not the hidden size; `why` is the reason."""
    a = architecture
    if a.head_dim * a.num_heads == a.hidden_size:
        return []
    return [
        "the width of a head (head_dim; --kv-channels in Megatron) must be hidden size / heads = "
        f"{a.hidden_size}/{a.num_heads}; got {a.head_dim}: {why}"
    ]


EMBEDDING, TIED_COPY = "model.embed_tokens.weight", "lm_head.weight"
"""The weight of tied embeddings, and the name of its copy in Qwen2-MoE."""
_TINY_GATE = 2.0**-20
"""A gate that earlier releases wrote on request: a constant, and not the gate of a model."""
_QWEN_EXPECTED = (SILU, only("use_sliding_window", False, None, why="attention over a sliding window is not supported"))


def _qwen_config(architecture: Architecture) -> dict[str, Any]:
    a = architecture
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **common_config(a),
        # only dense layers use this width
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


def _qwen_entries(architecture: Architecture) -> list[Entry]:
    """The tensors of the format: the weights of the model, and constants for weights that the model does not have."""
    found = []
    for tensor in tensors_of(architecture):
        # a constant gate halves the shared expert
        scale = 2.0 if tensor.row.kind == "doubled" and not architecture.shared_gate else 1.0
        for name, shape in tensor.weights.items():
            weight = None if tensor.is_constant else name
            found.append(Entry(name=name, shape=shape, weight=weight, value=tensor.row.fill or 0.0, scale=scale))
    if architecture.tied:
        # SGLang does not tie the two weights, and without this copy has random values there
        shape = (architecture.vocab_size, architecture.hidden_size)
        found.append(Entry(name=TIED_COPY, shape=shape, weight=EMBEDDING))
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
        """Whether the export recorded the feature, or the tensors of the feature are not the constant `values`."""
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
        shared_gate=has_shared and has("shared_gate", "shared_expert_gate.", 0.0, _TINY_GATE),
    )


QWEN2_MOE = Format(
    model_type="qwen2_moe",
    name=lambda weight, architecture: weight,
    problems=lambda architecture: head_dim_problems(
        architecture, why="vLLM supports no other width for this architecture"
    ),
    config=_qwen_config,
    entries=_qwen_entries,
    architecture=_qwen_architecture,
)


_EMO_EXPECTED = (
    SILU,
    only("attention_bias", False, None, why="the format then also has a bias of the output projection"),
    only("dense_mlp_bias", False, None, why="MLPs of the imported Megatron model have no bias"),
    only("always_active_experts", None, [], why="the weight of such an expert is a probability"),
    only("always_active_experts_per_layer", None, [], why="the weight of such an expert is a probability"),
    only("num_shared_experts", 0, 1, None, why="several weigh 1 in total in this format, and 1 each in training"),
)
_EMO_NAMES = {
    "input_layernorm": "pre_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp.shared_expert.": "mlp.experts.{last}.",
}
"""Names in Qwen2-MoE -> names in this format."""


def _emo_problems(architecture: Architecture) -> list[str]:
    a = architecture
    problems = head_dim_problems(a, why="the authors' code supports no other width")
    if a.shared_hidden not in (0, a.expert_hidden):
        problems.append(
            "the shared expert (--moe-shared-expert-intermediate-size) must be as wide as a routed expert, "
            f"{a.expert_hidden}; got {a.shared_hidden}: several shared experts weigh 1 in total in this format, and 1 "
            "each in training"
        )
    if a.shared_gate:
        problems.append("the shared expert must have no gate: the model was trained with --moe-shared-expert-gate")
    if a.qkv_bias:
        problems.append(
            "q, k and v must have no bias (--add-qkv-bias): in this format the output projection then has a bias too"
        )
    if a.renormalise and a.shared_hidden:
        problems.append(
            "with a shared expert the top-k must not be renormalised (norm_topk_prob; --moe-router-pre-softmax in "
            "Megatron): the authors' code does not support it"
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
        # the released configuration has true here, which breaks batched generation
        "output_router_logits": False,
        RECORD: {},
    }
    if a.dense_layers:
        is_sparse = [layer in a.moe_layers for layer in range(a.num_layers)]
        config["num_experts_per_layer"] = [config["num_experts"] * sparse for sparse in is_sparse]
        config["num_shared_experts_per_layer"] = [num_shared * sparse for sparse in is_sparse]
        config["dense_intermediate_size"] = a.dense_hidden
    return config


def _emo_name(weight: str, architecture: Architecture) -> str:
    for theirs, ours in _EMO_NAMES.items():
        weight = weight.replace(theirs, ours.format(last=architecture.num_experts))
    return weight


def _emo_entries(architecture: Architecture) -> list[Entry]:
    found = []
    for entry in _qwen_entries(architecture):
        # this format has no constants: a weight that the model lacks is absent here too
        if entry.weight is None or (entry.name == TIED_COPY and architecture.tied):
            continue
        name, shape, padding = _emo_name(entry.name, architecture), entry.shape, 0
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
        problems.append(
            f"every MoE layer must have the same number of experts (Megatron has one --num-experts); got {counts}"
        )
    shared_counts = _per_layer(config, "num_shared_experts", num_layers=num_layers, otherwise=num_shared)
    if {n for n, all_of in zip(shared_counts, counts, strict=True) if all_of} - {num_shared}:
        problems.append(f"every MoE layer must have num_shared_experts {num_shared}; got {shared_counts}")
    if problems:
        raise ValueError("; ".join(problems))
    dense = tuple(layer for layer, count in enumerate(counts) if count == 0)
    architecture = Architecture(
        **common_sizes(config),
        num_experts=max(sparse, default=num_shared) - num_shared,
        top_k=whole_number(config, "num_experts_per_tok") - num_shared,
        expert_hidden=whole_number(config, "intermediate_size"),
        shared_hidden=whole_number(config, "intermediate_size") if num_shared else 0,
        dense_layers=dense,
        dense_hidden=whole_number(config, "dense_intermediate_size") if dense else 0,
    )
    # what the authors' code does not compute, this format cannot mean
    if problems := _emo_problems(architecture):
        raise ValueError("; ".join(problems))
    return architecture


def _per_layer(config: Mapping[str, Any], name: str, *, num_layers: int, otherwise: int) -> list[int]:
    counts = whole_numbers(config, f"{name}_per_layer") or [otherwise] * num_layers
    if len(counts) != num_layers:
        raise ValueError(f"{name}_per_layer must have one entry per layer, {num_layers} in total; got {len(counts)}")
    return counts


EMO = Format(
    model_type="emo",
    name=_emo_name,
    problems=_emo_problems,
    config=_emo_config,
    entries=_emo_entries,
    architecture=_emo_architecture,
)
FORMATS: dict[str, Format] = {format.model_type: format for format in (QWEN2_MOE, EMO)}
"""The formats by model_type."""
