"""Convert the model in a run_config.yaml of Megatron-Bridge to Megatron's flags, and flags to Bridge's fields.

A Bridge checkpoint has no flags. The section `model` of its run_config.yaml holds the fields of Megatron's
TransformerConfig and of Bridge's model provider. Most fields have the name of Megatron's flag. A field that has no flag
and may change the model is an error. The file is read as plain data: nothing that the file names is called.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

RUN_CONFIG = "run_config.yaml"
"""File in a Bridge checkpoint: the configuration of the run, as YAML."""
RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""Fields of Bridge -> flags of Megatron with the same value."""
TOKENIZER_FLAGS = (
    *("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "special_tokens", "metadata_path"),
    *("tiktoken_pattern", "tiktoken_num_special_tokens", "chat_template", "vocab_extra_ids"),
    *("tokenizer_sentencepiece_legacy", "tokenizer_sentencepiece_ignore_extra_whitespaces"),
    *("tokenizer_hf_no_use_fast", "tokenizer_hf_no_include_special_tokens", "trust_remote_code"),
    *("null_tokenizer_eod_id", "null_tokenizer_pad_id"),
)
"""Fields of the section `tokenizer` that are flags of Megatron."""
PROVIDERS = ("GPTModelProvider", "OlMoEModelProvider")
"""Bridge's providers whose models are Megatron's GPTModel; the names of providers with pools begin with Pool."""
_PACKAGES = ("megatron.bridge.models.", "emo_megatron.bridge.providers.")
ONE_LAYER_SPECS = tuple(
    f"megatron.bridge.models.gpt_provider.{name}_layer_spec"
    for name in ("default", "transformer_engine", "transformer_engine_full", "local")
)
"""Bridge's functions for Megatron's own layers; they build every layer alike, whatever moe_layer_freq is."""
BLOCK_SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
"""Megatron's function for its own layers, with experts by moe_layer_freq."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OF_THE_RUN = _names(
    """
    _target_ activation_func activation_func_fp8_input_store gated_linear_unit params_dtype
    share_embeddings_and_output_weights transformer_layer_spec
    autocast_dtype barrier_with_L1_time batch_p2p_comm batch_p2p_sync bias_activation_fusion cp_comm_type
    cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering cpu_offloading_weights
    cuda_graph_modules cuda_graph_retain_backward_graph cuda_graph_scope cuda_graph_use_single_mempool
    deallocate_pipeline_outputs dense_grouped_gemm disable_parameter_transpose_cache embedding_init_method
    enable_autocast expert_gtp_weight_remat_size finalize_model_grads_func fp4_param fp8_dot_product_attention
    fp8_multi_head_attention fp8_param fused_single_qkv_rope grad_scale_func grad_sync_func gtp_weight_remat_size
    hetereogenous_dist_checkpoint hf_model_id hf_model_revision inference_sampling_seed init_method
    memory_efficient_layer_norm moe_grad_scale_func mtp_grad_scale_func no_sync_func
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints output_layer_init_method parallel_output param_sync_func
    persist_layer_norm pipeline_dtype scatter_embedding_sequence_parallel should_pad_vocab timers tp_comm_atomic_ag
    tp_comm_atomic_rs tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_only_amax_red
    use_arbitrary_attention_mask use_inference_optimized_layers use_te_rng_tracker
    use_transformer_engine_full_layer_spec variable_seq_lengths virtual_pipeline_model_parallel_size
    pipeline_model_parallel_layout overlap_p2p_comm inference_rng_tracker log_max_attention_logit test_mode
    """
)
"""Fields without a flag of the same name that describe the run or the kernels, and fields that `model_of` converts."""
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_POSITIONS = ("rope", "learned_absolute", "none")
# (activation, gated) -> the flags that request the activation
_ACTIVATIONS: dict[tuple[str, bool], dict[str, bool]] = {
    ("torch.nn.functional.silu", True): {"swiglu": True},
    ("torch.nn.functional.gelu", False): {},
    ("torch._C._nn.gelu", False): {},
    ("megatron.core.activations.squared_relu", False): {"squared_relu": True},
}


def read_run_config(path: Path) -> dict[str, Any]:
    """Load a run_config.yaml as plain data; ValueError if the file is not YAML with a section `model`."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be a run_config.yaml, but is not YAML of plain data: {reason}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} must be a run_config.yaml with a section named model")
    return config


def flags_of_run(path: Path, *, vocab_rows: int) -> argparse.Namespace:
    """The flags of a Megatron run of the model that Bridge trained, in the form of Megatron's own parser.

    Args:
        path: the run_config.yaml in the folder of the checkpoint's iteration.
        vocab_rows: rows of the stored embedding.

    Raises:
        ValueError: Megatron's flags cannot express the model; the message names each field.
    """
    from emo_megatron.checkpoint.model_flags import megatron_parser

    config = read_run_config(path)
    model = config["model"]
    problems = _problems_with_layers(model)
    try:
        flags = model_of(model)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(
            f"{path} describes a model that Megatron's flags cannot express: {'; '.join(problems)}. Export the "
            "checkpoint to a Hugging Face folder with AutoBridge, see docs/bridge.md#checkpoints"
        )
    if _target(model.get("transformer_layer_spec")) in ONE_LAYER_SPECS:
        flags["moe_layer_freq"] = 1
    tokenizer = config.get("tokenizer")
    given = tokenizer if isinstance(tokenizer, dict) else {}
    flags |= {name: given[name] for name in TOKENIZER_FLAGS if name in given}
    copied = path.parent / "tokenizer"
    if flags.get("tokenizer_type") == "HuggingFaceTokenizer" and (copied / "tokenizer_config.json").is_file():
        # Bridge stores the tokenizer in the checkpoint; the folder that the run named may be on another machine
        flags["tokenizer_model"] = str(copied.resolve())
    flags |= {"padded_vocab_size": vocab_rows, "rank": 0, "world_size": 1, "ckpt_format": "torch_dist"}
    args = megatron_parser().parse_args([])
    vars(args).update(flags)
    return args


def model_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the model in a provider's fields, by the names of Megatron's parser.

    Args:
        fields: field -> value, as in a run_config.yaml: classes and functions are `{"_target_": name}`.

    Raises:
        ValueError: one line that names every field that no flag can express.
    """
    from emo_megatron.checkpoint.model_flags import AS_TRAINED, FUNCTION, NOT_THE_MODEL

    activation, dtype = fields.get("activation_func"), _target(fields.get("params_dtype"))
    gated = bool(fields.get("gated_linear_unit"))
    # further keys are arguments, such as approximate
    is_plain = isinstance(activation, dict) and activation.keys() <= {"_target_", "_call_"}
    kind = _ACTIVATIONS.get((_target(activation), gated)) if is_plain else None
    position = fields.get("position_embedding_type")
    wanted = FUNCTION | AS_TRAINED
    known = wanted | NOT_THE_MODEL | OF_THE_RUN | RENAMED.keys()
    problems = [
        f"model.{name} must be off, because Megatron has no such flag; got {_shown(value)}"
        for name, value in fields.items()
        if value and name not in known and not name.startswith(("pool_", "_"))
    ] + [
        f"model.{name} must be a plain value; got {_shown(value)}"
        for name, value in fields.items()
        if isinstance(value, dict) and (name in wanted or name in RENAMED) and name not in OF_THE_RUN
    ]
    for name, holds, must, got in (
        ("activation_func", kind is not None, "silu with gated_linear_unit, gelu or squared_relu without", activation),
        ("position_embedding_type", position in _POSITIONS, " or ".join(_POSITIONS), position),
        ("params_dtype", dtype in _DTYPES, " or ".join(_DTYPES), dtype),
        ("multi_latent_attention", not fields.get("multi_latent_attention"), "False", True),
        ("heterogeneous_block_specs", not fields.get("heterogeneous_block_specs"), "False", True),
    ):
        if not holds:
            problems.append(f"model.{name} must be {must}; got {got!r}")
    if problems:
        raise ValueError("; ".join(problems))
    flags = {name: value for name, value in fields.items() if name in wanted or name.startswith("pool_")}
    flags |= {flag: fields[name] for name, flag in RENAMED.items() if name in fields}
    heads, groups = fields.get("num_attention_heads"), fields.get("num_query_groups")
    return flags | {
        **{"swiglu": False, "squared_relu": False, "params_dtype": _DTYPES[dtype]},
        **(kind or {}),
        "untie_embeddings_and_output_weights": not fields.get("share_embeddings_and_output_weights", True),
        "num_query_groups": groups or heads,
        "group_query_attention": groups not in (None, heads),
        "max_position_embeddings": fields.get("seq_length"),
        "transformer_impl": fields.get("transformer_impl", "transformer_engine"),
    }


def fields_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `model_of` for a SwiGLU model: fields of Bridge's provider. Unrelated flags are kept."""
    flags = dict(flags)
    assert flags.pop("swiglu"), "only SwiGLU models are built from flags"
    fields = {name: flags.pop(flag) for name, flag in RENAMED.items() if flag in flags}
    return (
        flags
        | fields
        | {
            "activation_func": torch.nn.functional.silu,
            "gated_linear_unit": True,
            "share_embeddings_and_output_weights": not flags["untie_embeddings_and_output_weights"],
        }
    )


def _problems_with_layers(model: Mapping[str, Any]) -> list[str]:
    """Reasons why the layers of a provider may not be those that Megatron builds from flags."""
    provider, spec = _target(model), _target(model.get("transformer_layer_spec"))
    kind = provider.rpartition(".")[2]
    problems = []
    if not provider.startswith(_PACKAGES) or kind.removeprefix("Pool") not in PROVIDERS:
        problems.append(f"model._target_ must be {' or '.join(PROVIDERS)}, with or without pools; got {provider!r}")
    if spec not in (*ONE_LAYER_SPECS, BLOCK_SPEC):
        problems.append(
            f"model.transformer_layer_spec must name Megatron's own layers ({ONE_LAYER_SPECS[0]} or {BLOCK_SPEC}); got "
            f"{spec!r}, whose layers may compute something else"
        )
    return problems


def _target(value: Any) -> str:
    """The name of a class or function in a run_config.yaml; empty if the value is none."""
    name = value.get("_target_") if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def _shown(value: Any) -> str:
    return repr(_target(value) or value)[:80]
