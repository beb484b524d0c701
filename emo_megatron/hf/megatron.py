"""Convert a Megatron checkpoint's flags to an `Architecture` and its weights to the names of mapping.py, and back.

A model that the Hugging Face formats cannot express is an error. Weights are read one by one and joined while they are
written.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_megatron.checkpoint.model_flags import BALANCE_LOSSES, megatron_parser, model_flags, stored_flags
from emo_megatron.checkpoint.names import PREDICTION
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight
from emo_megatron.config import PoolConfig
from emo_megatron.hf.mapping import (
    FUSED_NORM,
    OWN_NORM,
    Architecture,
    Joined,
    NormPlace,
    into_groups,
    out_of_groups,
    shape_problems,
    tensors_of,
)
from emo_megatron.mcore.args import add_pool_args
from emo_megatron.mcore.unsupported import only, problems_of

_ROPE = "the formats have rotary positions over the whole head, not interleaved and not scaled"
_NORM = "the formats have RMSNorm before attention and MLP, with the weight itself as the factor"
_MLP = "the formats have MLPs of the form down(silu(gate) * up), without bias"
_ATTENTION = "the formats have plain multi-head or grouped-query attention without norms of q and k"
_ROUTER = "the formats have routers with a softmax and its top-k, without bias, groups or scaling"
_RANDOM = "the formats have routers without noise on the input or on the scores"
_DROPLESS = "in the formats no token is dropped"
REQUIREMENTS = (
    only("position_embedding_type", "rope", why=_ROPE),
    only("rotary_percent", 1.0, why=_ROPE),
    only("rotary_interleaved", False, None, why=_ROPE),
    only("use_rope_scaling", False, why=_ROPE),
    only("rotary_seq_len_interpolation_factor", None, 1, why=_ROPE),
    only("no_rope_freq", None, why=_ROPE),
    only("normalization", "RMSNorm", why=_NORM),
    only("layernorm_zero_centered_gamma", False, why=f"{_NORM} (--apply-layernorm-1p)"),
    only("apply_residual_connection_post_layernorm", False, why=_NORM),
    only("swiglu", True, why=_MLP),
    only("add_bias_linear", False, why=f"{_MLP} (--disable-bias-linear)"),
    only("glu_linear_offset", 0.0, why=_MLP),
    only("activation_func_clamp_value", None, why=_MLP),
    only("moe_mlp_glu_interleave_size", None, why=_MLP),
    only("moe_shared_expert_glu_interleave_size", None, why=_MLP),
    only("qk_layernorm", False, why=_ATTENTION),
    only("qk_l2_norm", False, why=_ATTENTION),
    only("multi_latent_attention", False, why=_ATTENTION),
    only("attention_output_gate", False, why=_ATTENTION),
    only("experimental_attention_variant", None, why=_ATTENTION),
    only("window_size", None, why=_ATTENTION),
    only("softmax_type", "vanilla", why=_ATTENTION),
    only("moe_router_score_function", "softmax", why=_ROUTER),
    only("moe_router_enable_expert_bias", False, why=_ROUTER),
    only("moe_router_topk_scaling_factor", None, 1.0, why=_ROUTER),
    only("moe_router_num_groups", None, 1, why=_ROUTER),
    only("moe_router_group_topk", None, 1, why=_ROUTER),
    only("moe_router_topk_limited_devices", None, 0, why=_ROUTER),
    only(
        *("moe_router_load_balancing_type", *BALANCE_LOSSES),
        why=f"{_ROUTER}; this type balances the load by choosing other experts than those of the highest score",
    ),
    only("moe_router_force_load_balancing", False, why=_RANDOM),
    only("moe_router_force_biased", None, why=_RANDOM),
    only("moe_input_jitter_eps", None, why=_RANDOM),
    only("moe_expert_capacity_factor", None, why=_DROPLESS),
    only("moe_token_dropping", False, why=_DROPLESS),
    only("moe_apply_probs_on_input", False, why="the formats multiply the output of an expert by its probability"),
    only("moe_latent_size", None, why="the formats have experts that read and write the hidden size"),
    only("use_mup", False, why="the formats have no multipliers of embedding and logits"),
    only("heterogeneous_layers_config_path", None, why="the formats have equal layers"),
    only("hybrid_layer_pattern", None, why="in the formats every layer is attention and an MLP"),
)
"""Flags that change the function of a model, and the values that both formats can express."""
SAME = {
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "num_experts": "num_experts",
    "top_k": "moe_router_topk",
    "max_positions": "max_position_embeddings",
    "norm_eps": "layernorm_epsilon",
}
"""Fields of `Architecture` -> flags with the same value."""
MODEL_FLAGS = (
    *SAME.values(),
    *("ffn_hidden_size", "group_query_attention", "num_query_groups", "kv_channels", "rotary_base"),
    *("untie_embeddings_and_output_weights", "moe_router_pre_softmax", "moe_ffn_hidden_size"),
    "moe_shared_expert_intermediate_size",
)
"""Flags that `architecture_of` reads, in addition to REQUIREMENTS."""


def architecture_of(checkpoint: MegatronCheckpoint) -> Architecture:
    """The model in a checkpoint; ValueError names every flag that prevents an export, with the reason."""
    args = _stored_flags(checkpoint)
    # unknown flags are an error, even if no logits will be compared
    model_flags(checkpoint, megatron_parser())
    problems = export_problems(args, moe_layers=checkpoint.moe_layers)
    if problems:
        raise ValueError(f"{checkpoint.path} cannot be exported: {'; '.join(problems)}")
    # numbers of multi-token prediction, which the formats do not have, follow those of the decoder's layers
    return architecture_of_flags(
        args,
        moe_layers=[number - 1 for number in checkpoint.moe_layers],
        vocab_size=checkpoint.names["embedding.word_embeddings.weight"].shape[0],
    )


def export_problems(
    args: argparse.Namespace, *, moe_layers: Collection[int], name_of: Callable[[str], str] = str
) -> list[str]:
    """One sentence for each flag that no Hugging Face format can express.

    `name_of` maps a flag, as an attribute of `args`, to its name in the sentence; `moe_layers` are the layers with
    experts.
    """
    problems = problems_of(REQUIREMENTS, args, name_of=name_of)
    if not moe_layers:
        problems.append(
            f"at least one layer must have experts ({name_of('num_experts')}); this model has no such layer"
        )
    return problems


def architecture_of_flags(args: argparse.Namespace, *, moe_layers: Collection[int], vocab_size: int) -> Architecture:
    """The model of flags without `export_problems`; `moe_layers` count from 0, and `vocab_size` includes padding."""
    dense = tuple(layer for layer in range(args.num_layers) if layer not in moe_layers)
    heads = args.num_attention_heads
    return Architecture(
        **{field: getattr(args, name) for field, name in SAME.items()},
        vocab_size=vocab_size,
        num_kv_heads=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels or args.hidden_size // heads,
        expert_hidden=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        shared_hidden=args.moe_shared_expert_intermediate_size or 0,
        dense_hidden=args.ffn_hidden_size if dense else 0,
        dense_layers=dense,
        renormalise=not args.moe_router_pre_softmax,
        rope_theta=float(args.rotary_base),
        tied=not args.untie_embeddings_and_output_weights,
        qkv_bias=bool(getattr(args, "add_qkv_bias", False)),
        shared_gate=bool(getattr(args, "moe_shared_expert_gate", False)),
    )


def _stored_flags(checkpoint: MegatronCheckpoint) -> argparse.Namespace:
    """The flags in a checkpoint; ValueError if one of MODEL_FLAGS is missing."""
    args = stored_flags(checkpoint)
    missing = [name for name in MODEL_FLAGS if not hasattr(args, name)]
    if missing:
        raise ValueError(
            f"the flags in {checkpoint.path} lack {', '.join(missing)}: the version of Megatron that wrote this "
            "checkpoint is not supported; load and save the checkpoint with a supported version"
        )
    return args


def flags_of(
    architecture: Architecture, *, dtype: torch.dtype, moe_norm: NormPlace, pools: dict[str, Any], tokenizer: str | None
) -> argparse.Namespace:
    """The flags of a Megatron run of a model, in the form of Megatron's own parser.

    Args:
        architecture, dtype: of the model.
        moe_norm: FUSED_NORM for Megatron's local layers, OWN_NORM for Transformer Engine's layers.
        pools: fields of PoolConfig without the default value.
        tokenizer: folder of the model's tokenizer; None: the flags name no tokenizer (NullTokenizer).
    """
    args = add_pool_args(megatron_parser()).parse_args([])
    values = values_of(architecture) | {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "transformer_impl": "local" if moe_norm == FUSED_NORM else "transformer_engine",
        "moe_grouped_gemm": moe_norm != FUSED_NORM,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "ckpt_format": "torch_dist",
        "rank": 0,
        "world_size": 1,
        "tokenizer_type": "HuggingFaceTokenizer" if tokenizer else "NullTokenizer",
        "tokenizer_model": tokenizer,
        **dataclasses.asdict(PoolConfig(**pools)),
    }
    for name, value in values.items():
        setattr(args, name, value)
    return args


def check_router(architecture: Architecture, *, where: Path | str) -> None:
    """Raise ValueError if Megatron has no flags for the router; `where` is the file that describes the model."""
    if architecture.top_k == 1 and architecture.renormalise:
        raise ValueError(
            f"{where}: num_experts_per_tok must be at least 2 if norm_topk_prob is true; got 1, with which every gate "
            "is 1: Megatron has no flags for such a router, so this model cannot be converted"
        )


def values_of(architecture: Architecture) -> dict[str, Any]:
    """The values of the flags that describe the model; the inverse of `architecture_of_flags`.

    Call `check_router` first: some routers have no flags.
    """
    a = architecture
    return {
        **{name: getattr(a, field) for field, name in SAME.items()},
        "ffn_hidden_size": a.dense_hidden or a.expert_hidden,
        "group_query_attention": a.num_kv_heads != a.num_heads,
        "num_query_groups": a.num_kv_heads,
        "kv_channels": a.head_dim,
        "seq_length": a.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": int(a.rope_theta) if a.rope_theta.is_integer() else a.rope_theta,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": a.qkv_bias,
        "untie_embeddings_and_output_weights": not a.tied,
        "vocab_size": a.vocab_size,
        "padded_vocab_size": a.vocab_size,
        # with a list, even a list of ones, Megatron gives every layer its own names
        "moe_layer_freq": ([int(layer in a.moe_layers) for layer in range(a.num_layers)] if a.dense_layers else 1),
        "moe_router_pre_softmax": not a.renormalise,
        "moe_ffn_hidden_size": a.expert_hidden,
        "moe_shared_expert_intermediate_size": a.shared_hidden or None,
        "moe_shared_expert_gate": a.shared_gate,
    }


class MegatronWeights:
    """The weights of a model in a checkpoint; ValueError if the tensors in the checkpoint do not match the model.

    Layers of multi-token prediction are left out.
    """

    def __init__(self, checkpoint: MegatronCheckpoint, architecture: Architecture) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        has_own_norm = f"decoder.layers.{architecture.moe_layers[0]}.{OWN_NORM}" in checkpoint.names
        tensors = _tensors(architecture, OWN_NORM if has_own_norm else FUSED_NORM)
        stored = {name: info.shape for name, info in checkpoint.names.items() if not name.startswith(PREDICTION)}
        if problems := shape_problems(stored, {tensor.name: tensor.shape for tensor in tensors}):
            raise ValueError(f"the tensors in {checkpoint.path} do not match its flags: {'; '.join(problems)}")
        self._held = {weight: tensor for tensor in tensors for weight in tensor.weights}

    def read(self, weight: str) -> Tensor:
        """A weight, by its name in `weight_shapes`, sliced out of the stored tensor."""
        tensor = self._held[weight]
        names, shape = list(tensor.weights), tensor.weights[weight]
        place = names.index(weight)
        if tensor.row.kind == "qkv":
            return out_of_groups(self._checkpoint.read(tensor.name), self._architecture)[place]
        num_parts = len(tensor.row.weights)
        expert, part = divmod(place, num_parts)
        start = sum(tensor.weights[before][0] for before in names[place - part : place])
        offset, box = (start, *(0 for _ in shape[1:])), shape
        if tensor.row.is_of_experts:
            offset, box = (expert, *offset), (1, *box)
        return self._checkpoint.read_box(tensor.name, offset, box).reshape(shape)


def megatron_weights(
    architecture: Architecture, read: Callable[[str], Tensor], *, dtype: torch.dtype, moe_norm: NormPlace
) -> dict[str, LazyWeight]:
    """The tensors of a model's Megatron checkpoint; each tensor is computed while it is written.

    `read` returns a weight by its name in `weight_shapes`, in this dtype; `moe_norm` is the name of the norm of MoE
    layers.
    """
    return {
        tensor.name: LazyWeight(shape=tensor.shape, dtype=dtype, rows=_rows(tensor, architecture, read))
        for tensor in _tensors(architecture, moe_norm)
    }


def _tensors(architecture: Architecture, moe_norm: NormPlace) -> list[Joined]:
    return [tensor for tensor in tensors_of(architecture, moe_norm=moe_norm) if not tensor.is_constant]


def _rows(tensor: Joined, architecture: Architecture, read: Callable[[str], Tensor]) -> Callable[[int, int], Tensor]:
    names, num_parts = list(tensor.weights), len(tensor.row.weights)

    def rows(start: int, stop: int) -> Tensor:
        if tensor.row.is_of_experts:
            experts = (names[e * num_parts : (e + 1) * num_parts] for e in range(start, stop))
            return torch.stack([torch.cat([read(name) for name in expert]) for expert in experts])
        parts = [read(name) for name in names]
        joined = into_groups(parts, architecture) if tensor.row.kind == "qkv" else torch.cat(parts)
        return joined[start:stop]

    return rows
