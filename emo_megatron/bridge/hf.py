"""Megatron-Bridge's AutoBridge for the Hugging Face formats of this package: Qwen2-MoE, and the EMO authors' format.

Importing this module registers both formats. Sizes, names and constants come from hf/formats.py and hf/mapping.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emo_megatron.bridge.hf_mappings import constants_of, mappings_of
from emo_megatron.bridge.pooled import in_words_of_bridge
from emo_megatron.bridge.providers import PoolGPTModelProvider
from emo_megatron.checkpoint.bridge_flags import RENAMED, fields_of, model_of, moe_layers_of
from emo_megatron.config import pool_config_of
from emo_megatron.hf.config_file import RECORD, record
from emo_megatron.hf.folder import CONFIG, HuggingFaceFolder
from emo_megatron.hf.formats import EMO, QWEN2_MOE, Entry, Format
from emo_megatron.hf.mapping import Architecture
from emo_megatron.hf.megatron import SAME, architecture_of_flags, check_router, export_problems, values_of

BALANCE = 0.1
"""Coefficient of the load-balancing loss of a model with pools, times the number of layers."""
FIELDS = {field: flag for field, flag in SAME.items() if flag != "num_experts"} | {
    "vocab_size": "vocab_size",
    "num_experts": "num_moe_experts",
    "max_positions": "seq_length",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "expert_hidden": "moe_ffn_hidden_size",
    "shared_hidden": "moe_shared_expert_intermediate_size",
    "dense_hidden": "ffn_hidden_size",
    "dense_layers": "moe_layer_freq",
    "renormalise": "moe_router_pre_softmax",
    "rope_theta": "rotary_base",
    "tied": "share_embeddings_and_output_weights",
    "qkv_bias": "add_qkv_bias",
    "shared_gate": "moe_shared_expert_gate",
}
"""Fields of `Architecture` -> fields of Bridge's provider, for messages."""
CONVERTED_ALREADY = {
    *("group_query_attention", "max_position_embeddings", "padded_vocab_size", "untie_embeddings_and_output_weights")
}
"""Flags of a model that other fields of Bridge's provider express."""
_ROUTER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.router\.(?:to_wrap\.)?weight")
_LORA_B = ".lora_B.weight"
"""End of the name of an adapter's second factor, which has the rows of the adapted weight."""
_KNOWN_FLAGS = {flag: field for field, flag in RENAMED.items()}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What AutoBridge was made from: a Hugging Face folder, or a configuration without weights."""

    architecture: Architecture
    config: Mapping[str, Any]
    """The content of config.json."""
    name: str
    """The folder or the configuration, for messages."""


def source_of(hf_pretrained: Any, format: Format) -> Source:
    """The model of AutoBridge's `hf_pretrained`; ValueError if the format or Megatron cannot express the model."""
    # Bridge's wrapper of a configuration has no state; another error does not mean that there are no weights
    if not hasattr(hf_pretrained, "state"):
        return _source_of_config(getattr(hf_pretrained, "config", hf_pretrained), format)
    files = hf_pretrained.state.source
    if not isinstance(files, SafeTensorsStateSource):
        raise ValueError(
            "AutoBridge must read this model from files: call AutoBridge.from_hf_pretrained with the name of the "
            f"folder; got weights in memory ({type(files).__name__})"
        )
    folder = HuggingFaceFolder(files.path)
    return Source(architecture=folder.architecture, config=folder.config, name=str(folder.path))


def _source_of_config(config: PretrainedConfig, format: Format) -> Source:
    fields = config.to_dict()

    def is_absent(part: str, _: set[float]) -> bool:
        # without weights, a feature is absent if the record or the configuration says so
        return fields.get(RECORD) is not None or (part == "_proj.bias" and fields.get("qkv_bias") is False)

    name = f"the {type(config).__name__}"
    try:
        return Source(architecture=format.architecture(fields, is_absent), config=fields, name=name)
    except ValueError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from None


def provider_of(source: Source, *, dtype: torch.dtype) -> GPTModelProvider:
    """Bridge's provider of a model; with the pools that config.json records, if there are any."""
    a = source.architecture
    check_router(a, where=f"{source.name}: {CONFIG}")
    pools = record(source.config, RECORD).get("pools") or {}
    kind: Any = PoolGPTModelProvider if pools else GPTModelProvider
    fields = fields_of(values_of(a)) | {
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "transformer_layer_spec": functools.partial(
            get_gpt_decoder_block_spec, use_transformer_engine=HAVE_TE, normalization="RMSNorm"
        ),
        "moe_grouped_gemm": HAVE_TE,
        "moe_permute_fusion": HAVE_TE,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss" if pools else "aux_loss",
        "moe_aux_loss_coeff": BALANCE / a.num_layers
        if pools
        else float(source.config.get("router_aux_loss_coef") or 0),
    }
    if pools:
        where = f"{source.name}: {CONFIG}, {RECORD}.pools"
        fields |= dataclasses.asdict(pool_config_of(pools, where=where))
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(fields.keys() - known - CONVERTED_ALREADY):
        raise ValueError(f"every flag of the model must be a field of {kind.__name__}; it has no {', '.join(unknown)}")
    provider: GPTModelProvider = kind(**{name: value for name, value in fields.items() if name in known})
    return provider


def architecture_of_provider(config: Any, *, moe_layers: Collection[int] | None = None) -> Architecture:
    """The model of a provider's fields; ValueError names each field that the formats cannot express.

    Args:
        config: Bridge's provider, which is also the configuration of the model that the provider built.
        moe_layers: the layers with experts, from 0; None: those that the provider would build.
    """
    fields = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    fields |= _plain(type(config))
    if moe_layers is None:
        moe_layers = moe_layers_of(fields)
    try:
        flags = Namespace(**model_of(fields))
        problems = export_problems(
            flags, moe_layers=moe_layers, name_of=lambda name: f"model.{_KNOWN_FLAGS.get(name, name)}"
        )
    except ValueError as error:
        problems = [str(error)]
    if fields.get("mtp_num_layers"):
        problems.append(
            f"model.mtp_num_layers must be None, because the formats have no multi-token prediction; got "
            f"{fields['mtp_num_layers']}: python -m emo_megatron export drops or keeps these layers (--mtp)"
        )
    if problems:
        raise ValueError(f"this model cannot be converted to a Hugging Face format: {'; '.join(problems)}")
    return architecture_of_flags(flags, moe_layers=moe_layers, vocab_size=config.vocab_size)


def _plain(value: Any) -> Any:
    """The value as in a run_config.yaml: classes, functions and dtypes by their names."""
    if isinstance(value, functools.partial):
        return _plain(value.func) | {"_partial_": True, "_args_": list(value.args)} | value.keywords
    if isinstance(value, torch.dtype):
        return {"_target_": str(value)}
    return (
        {"_target_": f"{value.__module__}.{value.__qualname__}"}
        if callable(value) and hasattr(value, "__qualname__")
        else value
    )


class FormatBridge(MegatronModelBridge):
    """Conversion between one Hugging Face format and Megatron's GPTModel."""

    FORMAT: ClassVar[Format]
    _model: Architecture | None = None
    """The Megatron model of the current conversion; None before the first conversion."""
    _constants: Mapping[str, list[Entry]]
    """`constants_of` the model."""

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """The provider of the model in a Hugging Face folder or configuration."""
        dtype = self.dtype_from_hf(hf_pretrained.config, default=torch.float32)
        provider = provider_of(source_of(hf_pretrained, self.FORMAT), dtype=dtype)
        provider.make_vocab_size_divisible_by = self.make_vocab_size_divisible_by(provider.vocab_size)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The mappings of the current model; before the first conversion, of the Hugging Face model."""
        model = self._model or source_of(self.hf_pretrained, self.FORMAT).architecture
        return MegatronMappingRegistry(*mappings_of(self.FORMAT, model))

    def build_conversion_tasks(self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Bridge's tasks, after a check that Megatron's model and the Hugging Face model are the same model."""
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        self._begin(hf_pretrained, models)
        tasks = super().build_conversion_tasks(hf_pretrained, models, *args, **kwargs)
        names = self._megatron_global_param_names_all_pp_ranks(models)
        left = [name for name, task in zip(names, tasks, strict=False) if task is None]
        if left:
            raise ValueError(
                f"every parameter must have a place in the format {self.FORMAT.model_type}; {len(left)} have none, for "
                f"example {left[0]}: build the model from Megatron's own layers (model.transformer_layer_spec)"
            )
        return list(tasks)

    def stream_weights_megatron_to_hf(self, megatron_model: Any, hf_pretrained: Any, *args: Any, **kwargs: Any) -> Any:
        """Bridge's export, after a check that the format can express the model; constants are exported too."""
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        _require_expressible(self.FORMAT, self._begin(hf_pretrained, models))
        if any(".adapter." in name for model in models for name, _ in model.named_parameters()):
            raise NotImplementedError(
                "the model must have no adapters (peft): a merge into weights that the format stores doubled or padded "
                "is not implemented: export the adapter alone with AutoBridge.save_hf_adapter, and merge it with "
                "python -m emo_megatron import"
            )
        return super().stream_weights_megatron_to_hf(megatron_model, hf_pretrained, *args, **kwargs)

    def stream_adapter_weights_megatron_to_hf(self, megatron_model: Any, *args: Any, **kwargs: Any) -> Any:
        """Bridge's export of adapters alone; what changes a multiplied weight of the format is multiplied too."""
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        model = self._begin(self.hf_pretrained, models)
        _require_expressible(self.FORMAT, model)
        entries = {entry.name: entry for entry in self.FORMAT.entries(model)}
        for weight in super().stream_adapter_weights_megatron_to_hf(models, *args, **kwargs):
            entry = entries.get(weight.param_name.replace(_LORA_B, ".weight"))
            if entry is not None and entry.padding_rows:
                raise NotImplementedError(
                    f"an adapter of {entry.name} has no place in the format {self.FORMAT.model_type}, which adds rows "
                    f"to this weight: make AutoBridge from a folder of the format {QWEN2_MOE.model_type}"
                )
            yield weight if entry is None else weight._replace(weight=weight.weight * entry.scale)

    def maybe_modify_converted_hf_weight(
        self, task: Any, converted_weights_dict: dict[str, Tensor], hf_state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weights of a task without rows of padding; with a layer's norm, the constants of the layer."""
        model = self._model
        assert model is not None, "the model is known since the tasks exist"
        found = {}
        for name, tensor in converted_weights_dict.items():
            is_padded = task.global_param_name.endswith(("word_embeddings.weight", "output_layer.weight"))
            found[name] = tensor[: model.vocab_size] if is_padded else tensor
            for entry in self._constants.get(name, ()):
                if not self._has(entry.name, hf_state_dict):
                    continue
                # the folder's own constant, which is not zero in exports of earlier releases with a tiny gate
                value = hf_state_dict.get(entry.name, entry.value)
                found[entry.name] = torch.empty(entry.shape, dtype=tensor.dtype, device=tensor.device)
                found[entry.name].copy_(torch.as_tensor(value).expand(entry.shape))
        return found

    def _has(self, name: str, hf_state_dict: Mapping[str, Tensor]) -> bool:
        """Whether the Hugging Face model has this constant: transformers' own folders may have no biases."""
        if isinstance(hf_state_dict, dict):
            # a configuration without weights
            return "_proj.bias" not in name or getattr(self.hf_config, "qkv_bias", True)
        return name in hf_state_dict

    def _begin(self, hf_pretrained: Any, models: list[Any]) -> Architecture:
        """The Megatron model; ValueError if the Hugging Face model is another model."""
        names = self._megatron_global_param_names_all_pp_ranks(models)
        layers = {int(match[1]) for match in map(_ROUTER.fullmatch, names) if match}
        config = unwrap_model(models)[0].config
        model = architecture_of_provider(config, moe_layers=layers)
        source = source_of(hf_pretrained, self.FORMAT)
        if config.vocab_size <= source.architecture.vocab_size <= _padded_vocab_size(config):
            # the command export counts rows of padding too
            model = dataclasses.replace(model, vocab_size=source.architecture.vocab_size)
        differing = [
            f"model.{FIELDS[field.name]} is {ours!r} and {CONFIG} gives {theirs!r}"
            for field in dataclasses.fields(Architecture)
            # the length of the training samples may differ
            if field.name != "max_positions"
            for ours, theirs in [(getattr(model, field.name), getattr(source.architecture, field.name))]
            if ours != theirs
        ]
        if differing:
            raise ValueError(
                f"the Megatron model and {source.name} must be the same model: {'; '.join(differing)}: build the model "
                "with AutoBridge.to_megatron_provider, or name another Hugging Face model"
            )
        self._model, self._constants = model, constants_of(self.FORMAT, model)
        return model

    @classmethod
    def megatron_to_hf_config(cls, provider: Any) -> dict[str, Any]:
        """The fields of config.json for a provider; ValueError if the format cannot express the model."""
        model = architecture_of_provider(provider)
        _require_expressible(cls.FORMAT, model)
        return cls.FORMAT.config(model) | {
            "torch_dtype": str(provider.params_dtype).removeprefix("torch."),
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "layer_types": ["full_attention"] * model.num_layers,
        }


def _padded_vocab_size(config: Any) -> int:
    """Rows of the embedding of Bridge's model."""
    if not config.should_pad_vocab:
        return int(config.vocab_size)
    multiple = config.make_vocab_size_divisible_by
    return int(calculate_padded_vocab_size(config.vocab_size, multiple, config.tensor_model_parallel_size))


def _require_expressible(format: Format, model: Architecture) -> None:
    """Raise ValueError, with the fields of Bridge's provider, if the format cannot express the model."""
    if problems := format.problems(model):
        with in_words_of_bridge():
            raise ValueError(f"the model cannot be exported as {format.model_type}: {'; '.join(problems)}")


@MegatronModelBridge.register_bridge(source="Qwen2MoeForCausalLM", target=GPTModel, model_type=QWEN2_MOE.model_type)
class Qwen2MoeBridge(FormatBridge):
    """Qwen2-MoE, as `python -m emo_megatron export` writes and as transformers has."""

    FORMAT = QWEN2_MOE


@MegatronModelBridge.register_bridge(source="EmoForCausalLM", target=GPTModel, model_type=EMO.model_type)
class EmoBridge(FormatBridge):
    """The format in which the authors of EMO released their models. The authors' code is not required."""

    FORMAT = EMO


class EmoConfig(PretrainedConfig):
    """config.json of the authors' format as it is, for folders without the authors' code."""

    model_type = EMO.model_type


if EMO.model_type not in CONFIG_MAPPING:
    AutoConfig.register(EMO.model_type, EmoConfig)
