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

from emo_megatron.checkpoint.flag_lists import AS_TRAINED, FUNCTION, NOT_THE_MODEL, TOKENIZER, names
from emo_megatron.checkpoint.model_flags import megatron_parser

RUN_CONFIG = "run_config.yaml"
"""File in a Bridge checkpoint: the configuration of the run, as YAML."""
RENAMED = {
    "num_moe_experts": "num_experts",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""Fields of Bridge -> flags of Megatron with the same value."""
TOKENIZER_OF_THE_RUN = names(
    """
    _target_ make_vocab_size_divisible_by pad_vocab_size padded_vocab_size rank tensor_model_parallel_size
    use_tokenizer_vocab_size vocab_size
    """
)
"""Fields of the section `tokenizer` that do not change the tokens of a text."""
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


WITHOUT_FIELD = names(
    """
    add_position_embedding group_query_attention heterogeneous_layers_config_encoded_json
    heterogeneous_layers_config_path hybrid_layer_pattern hybrid_override_pattern kv_lora_rank max_position_embeddings
    mscale mscale_all_dim num_experts openai_gelu padded_vocab_size q_lora_rank qk_head_dim qk_pos_emb_head_dim
    quick_geglu relative_attention_max_distance relative_attention_num_buckets rope_type
    rotary_seq_len_interpolation_factor squared_relu swiglu untie_embeddings_and_output_weights use_rope_scaling
    use_rotary_position_embeddings v_head_dim
    """
)
"""Flags of FUNCTION that are no fields of Bridge's GPTModelProvider."""
CONVERTED = names(
    """
    activation_func gated_linear_unit params_dtype share_embeddings_and_output_weights seq_length transformer_impl
    bias_activation_fusion transformer_layer_spec
    """
)
"""Fields that `model_of` converts, in addition to RENAMED."""
REQUIRED = FUNCTION - WITHOUT_FIELD | CONVERTED | RENAMED.keys()
"""Fields without which the model is unknown: a default of Bridge's provider may differ from Megatron's default."""
OF_THE_RUN = names(
    """
    _target_ activation_func_fp8_input_store autocast_dtype barrier_with_L1_time batch_p2p_comm batch_p2p_sync
    cp_comm_type cpu_offloading cpu_offloading_activations cpu_offloading_double_buffering cpu_offloading_weights
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
"""Fields without a flag of the same name that describe the run or the kernels."""
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
    config = read_run_config(path)
    model = config["model"]
    try:
        flags = model_of(model)
    except ValueError as error:
        advice = (
            "Export the checkpoint to a Hugging Face folder with AutoBridge, see docs/bridge.md#checkpoints"
            if _problems_with_classes(model)
            else "This version of emo_megatron cannot read the model"
        )
        raise ValueError(f"{path} describes a model that Megatron's flags cannot express: {error}. {advice}") from None
    tokenizer = config.get("tokenizer")
    flags |= _tokenizer_flags(tokenizer if isinstance(tokenizer, dict) else {}, path=path)
    flags |= {"padded_vocab_size": vocab_rows, "rank": 0, "world_size": 1, "ckpt_format": "torch_dist"}
    args = megatron_parser().parse_args([])
    vars(args).update(flags)
    return args


def model_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the model in a provider's fields, by the names of Megatron's parser.

    Args:
        fields: field -> value, as in a run_config.yaml: classes and functions are `{"_target_": name}`; the provider's
            class is the field `_target_`.

    Raises:
        ValueError: one line that names every field that is missing or that no flag can express.
    """
    problems = _problems_with_classes(fields)
    if missing := sorted(REQUIRED - fields.keys()):
        problems.append(
            "the section model must have all fields that Bridge stores, because Bridge's defaults are not Megatron's; "
            f"missing: {', '.join(missing)}"
        )
    else:
        problems += _problems_with_arguments(fields) + _problems_with_fields(fields)
    if problems:
        raise ValueError("; ".join(problems))
    flags = {
        name: value
        for name, value in fields.items()
        if name in FUNCTION | AS_TRAINED
        or name.startswith("pool_")
        # a class or None stands for the default
        or (name in NOT_THE_MODEL and value is not None and not isinstance(value, dict))
    }
    flags |= {flag: fields[name] for name, flag in RENAMED.items()}
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    is_fused = bool(fields["bias_activation_fusion"])
    return flags | {
        **{"swiglu": False, "squared_relu": False, "params_dtype": _DTYPES[_target(fields["params_dtype"])]},
        **(_activation(fields) or {}),
        # with gelu, the fused kernel approximates the function
        **{"bias_gelu_fusion": is_fused, "bias_swiglu_fusion": is_fused},
        "untie_embeddings_and_output_weights": not fields["share_embeddings_and_output_weights"],
        "num_query_groups": groups or heads,
        "group_query_attention": groups not in (None, heads),
        "max_position_embeddings": fields["seq_length"],
        "transformer_impl": fields["transformer_impl"],
        "moe_layer_freq": _moe_layer_freq(fields),
    }


def moe_layers_of(fields: Mapping[str, Any]) -> list[int]:
    """The layers with experts that Bridge builds from a provider's fields, from 0."""
    if not fields["num_moe_experts"]:
        return []
    often, layers = _moe_layer_freq(fields), range(fields["num_layers"])
    return [layer for layer in layers if (often[layer] if isinstance(often, list) else layer % often == 0)]


def _moe_layer_freq(fields: Mapping[str, Any]) -> Any:
    return 1 if _target(fields["transformer_layer_spec"]) in ONE_LAYER_SPECS else fields["moe_layer_freq"]


def fields_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `model_of` for a SwiGLU model: fields of Bridge's provider. Unrelated flags are kept."""
    flags = dict(flags)
    if not flags.pop("swiglu"):
        raise ValueError(
            "the activation must be SwiGLU, because no other model is built from flags; got --swiglu False"
        )
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


def _problems_with_classes(fields: Mapping[str, Any]) -> list[str]:
    """Reasons why the provider may build other layers than Megatron does."""
    provider, spec = _target(fields.get("_target_")), fields.get("transformer_layer_spec")
    kind = provider.rpartition(".")[2]
    problems = []
    if not provider.startswith(_PACKAGES) or kind.removeprefix("Pool") not in PROVIDERS:
        problems.append(f"model._target_ must be {' or '.join(PROVIDERS)}, with or without pools; got {provider!r}")
    if _target(spec) not in (*ONE_LAYER_SPECS, BLOCK_SPEC):
        problems.append(
            f"model.transformer_layer_spec must name Megatron's own layers ({ONE_LAYER_SPECS[0]} or {BLOCK_SPEC}); got "
            f"{_shown(spec)}, whose layers may compute something else"
        )
    return problems


def _problems_with_arguments(fields: Mapping[str, Any]) -> list[str]:
    """Reasons why the function for the layers built other layers than the fields say."""
    spec = fields["transformer_layer_spec"]
    if _target(spec) in ONE_LAYER_SPECS:
        return [
            f"model.{name} must be off, because Bridge ignores the field with layers of {_target(spec)}; "
            f"got {fields[name]!r}"
            for name in ("qk_l2_norm", "experimental_attention_variant")
            if fields[name]
        ]
    if _target(spec) != BLOCK_SPEC or not isinstance(spec, dict):
        return []
    uses_te, normalization = fields["transformer_impl"] == "transformer_engine", fields["normalization"]
    allowed = {
        "use_transformer_engine": (uses_te,),
        "qk_l2_norm": (bool(fields["qk_l2_norm"]),),
        # layers of Transformer Engine read the field
        "normalization": (normalization, None) if uses_te else (normalization,),
    }
    given: dict[str, Any] = {"use_transformer_engine": None, "qk_l2_norm": False, "normalization": None}
    given |= {name: value for name, value in spec.items() if name not in ("_target_", "_partial_", "_call_", "_args_")}
    if spec.get("_args_"):
        given["_args_"] = spec["_args_"]
    problems = []
    for name, value in given.items():
        if value not in allowed.get(name, ()):
            wanted = f"{name} {allowed[name][0]!r}, as the fields say" if name in allowed else f"no argument {name}"
            problems.append(f"model.transformer_layer_spec must have {wanted}; got {_shown(value)}")
    return problems


def _problems_with_fields(fields: Mapping[str, Any]) -> list[str]:
    """Fields that no flag can express."""
    wanted = FUNCTION | AS_TRAINED | RENAMED.keys()
    known = wanted | NOT_THE_MODEL | OF_THE_RUN | CONVERTED
    problems = [
        f"model.{name} must be off, because Megatron has no such flag; got {_shown(value)}"
        for name, value in fields.items()
        if value and name not in known and not name.startswith(("pool_", "_"))
    ] + [
        f"model.{name} must be a plain value; got {_shown(value)}"
        for name, value in fields.items()
        if isinstance(value, dict) and name in wanted
    ]
    position, dtype = fields["position_embedding_type"], _target(fields["params_dtype"])
    activations = "silu with gated_linear_unit, gelu or squared_relu without"
    return problems + [
        f"model.{name} must be {must}; got {got!r}"
        for name, holds, must, got in (
            ("activation_func", _activation(fields) is not None, activations, fields["activation_func"]),
            ("position_embedding_type", position in _POSITIONS, " or ".join(_POSITIONS), position),
            ("params_dtype", dtype in _DTYPES, " or ".join(_DTYPES), dtype),
            ("multi_latent_attention", not fields["multi_latent_attention"], "False", True),
        )
        if not holds
    ]


def _activation(fields: Mapping[str, Any]) -> dict[str, bool] | None:
    """The flags that request the activation; None if there are none."""
    function = fields["activation_func"]
    # further keys are arguments, such as approximate
    if not isinstance(function, dict) or not function.keys() <= {"_target_", "_call_"}:
        return None
    return _ACTIVATIONS.get((_target(function), bool(fields["gated_linear_unit"])))


def _tokenizer_flags(fields: Mapping[str, Any], *, path: Path) -> dict[str, Any]:
    """The flags of the section `tokenizer`; ValueError names a field that no flag can express."""
    copied = path.parent / "tokenizer"
    # Bridge stores the tokenizer in the checkpoint; the folder that the run named may be on another machine
    is_copied = fields.get("tokenizer_type") == "HuggingFaceTokenizer" and (copied / "tokenizer_config.json").is_file()
    for name, value in fields.items():
        # the copy is of the revision
        is_of_the_copy = is_copied and name == "hf_tokenizer_kwargs" and value and value.keys() <= {"revision"}
        if value and name not in TOKENIZER | TOKENIZER_OF_THE_RUN and not is_of_the_copy:
            raise ValueError(
                f"{path}: tokenizer.{name} must not be set, because Megatron has no such flag; got {_shown(value)}. "
                "This version of emo_megatron cannot read the tokenizer"
            )
    flags = {name: value for name, value in fields.items() if name in TOKENIZER}
    return flags | ({"tokenizer_model": str(copied.resolve())} if is_copied else {})


def _target(value: Any) -> str:
    """The name of a class or function in a run_config.yaml; empty if the value is none."""
    name = value.get("_target_") if isinstance(value, dict) else value
    return name if isinstance(name, str) else ""


def _shown(value: Any) -> str:
    return repr(_target(value) or value)[:80]
