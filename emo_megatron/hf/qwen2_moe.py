"""Qwen2-MoE, which stock transformers, vLLM and SGLang run without remote code.

EMO is exactly a `Qwen2MoeForCausalLM`. That architecture scales its shared expert by sigmoid(gate . x), EMO by 1: a
gate of zeros gives sigmoid(0) = 1/2, and the shared down projection is stored doubled. Both are exact. Biases of q, k
and v are written as zeros, because vLLM always has them. `num_experts` and `num_experts_per_tok` count routed experts.
A model without shared expert gets one of zeros.

llama.cpp computes the sigmoid as silu(x)/x, which is not a number at 0: for GGUF a gate of `TINY_GATE` moves the
shared expert's weight by less than 1e-5 and keeps it finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emo_megatron.hf.architecture import Architecture
from emo_megatron.hf.config_file import (
    RECORD,
    SILU,
    common_config,
    common_sizes,
    head_dim_problems,
    record,
    switch,
    whole_number,
    whole_numbers,
)
from emo_megatron.hf.formats import Entry, Format, IsConstant
from emo_megatron.hf.mapping import tensors_of
from emo_megatron.mcore.unsupported import only, problems_of

TINY_GATE = 2.0**-20
"""A shared gate that is not zero, for llama.cpp."""
EXPECTED = (SILU, only("use_sliding_window", False, None, why="every position sees all before it"))


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


def entries(architecture: Architecture, *, shared_gate_value: float = 0.0) -> list[Entry]:
    """The tensors of the format: each weight by its name, and constants where the model has none."""
    found = []
    for tensor in tensors_of(architecture):
        value = shared_gate_value if tensor.row.needs == "shared_gate" else tensor.row.fill or 0.0
        # where the gate halves
        scale = 2.0 if tensor.row.kind == "doubled" and not architecture.shared_gate else 1.0
        for name, shape in tensor.weights.items():
            weight = None if tensor.is_constant else name
            found.append(Entry(name=name, shape=shape, weight=weight, value=value, scale=scale))
    return found


def _architecture(config: Mapping[str, Any], is_constant: IsConstant) -> Architecture:
    if problems := problems_of(EXPECTED, config, name_of=str):
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
    model_type="qwen2_moe", problems=head_dim_problems, config=_config, entries=entries, architecture=_architecture
)
