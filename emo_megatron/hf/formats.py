"""What a Hugging Face format is: its configuration, its tensors, and what it cannot express."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from emo_megatron.hf.architecture import ATTENTION, MLP, Architecture, weight_shapes
from emo_megatron.hf.entries import Entry
from emo_megatron.hf.fields import number, record, switch, whole_number

RECORD = "emo_megatron"
"""Key of config.json under which an export keeps what only Megatron knows; every loader ignores it."""


class Stored(Protocol):
    """A checkpoint folder, as far as a format looks at it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""

    def read(self, name: str) -> Tensor:
        """A tensor."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format, both ways.

    Attributes:
        model_type: its name in config.json.
        problems: what it cannot express of an architecture, one sentence each.
        config: what config.json says of an architecture; token ids and dtype are the caller's.
        entries: its tensors, in the order of the model. `shared_gate_value` fills a shared gate that the model lacks.
        architecture: what a folder of this format holds. Raises ValueError for what no `Architecture` expresses.
    """

    model_type: str
    problems: Callable[[Architecture], list[str]]
    config: Callable[[Architecture], dict[str, Any]]
    entries: Callable[..., list[Entry]]
    architecture: Callable[[Stored], Architecture]


def plain_entries(architecture: Architecture, rename: Callable[[str], str]) -> list[Entry]:
    """A tensor of the format for each weight, under another name."""
    return [
        Entry(name=rename(weight), shape=shape, weight=weight) for weight, shape in weight_shapes(architecture).items()
    ]


def renamer(layer_names: Mapping[str, str]) -> Callable[[str], str]:
    """Names of the LLaMA family.

    Args:
        layer_names: what of a layer has another name in this format: norms, router, the shared expert.
    """
    whole = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
    projections = {f"{name}": f"self_attn.{name}_proj.weight" for name in (*ATTENTION, "o")}
    projections |= {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in ATTENTION}

    def rename(weight: str) -> str:
        if weight in whole:
            return whole[weight] + ".weight"
        _, layer, rest = weight.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest in projections:
            return prefix + projections[rest]
        module, _, kind = rest.rpartition(".")
        if kind in MLP and module:
            # of an expert, the shared expert or a dense layer, whose MLP is the layer's own
            module = layer_names.get(module, module)
            return prefix + ".".join(filter(None, ["mlp", module, f"{kind}_proj.weight"]))
        return prefix + layer_names[rest] + ".weight"

    return rename


def expect(config: Mapping[str, Any], **wanted: Any) -> list[str]:
    """A sentence for every field that is given and is not what this package's models have."""
    return [
        f"{name} must be {value!r}; got {reprlib.repr(config[name])}"
        for name, value in wanted.items()
        if config.get(name) not in (None, value)
    ]


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary positions, where transformers 4 or 5 keeps it.

    Raises:
        ValueError: positions are scaled, or the base is no number.
    """
    parameters = record(config, "rope_parameters") or record(config, "rope_scaling")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions must not be scaled; config.json has rope_type {reprlib.repr(kind)}")
    if "rope_theta" not in parameters:
        return number(config, "rope_theta")
    return number(parameters, "rope_theta", of="rope_parameters")


def common_config(architecture: Architecture) -> dict[str, Any]:
    """Fields that both formats name alike."""
    a = architecture
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "norm_topk_prob": a.renormalise,
        "tie_word_embeddings": a.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def common_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """`Architecture` fields that both formats name alike.

    Raises:
        ValueError: naming every field that config.json lacks, or one that is not what it should be.
    """
    fields = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
    }
    needed = (*fields.values(), "rms_norm_eps", "norm_topk_prob")
    missing = [name for name in needed if name not in config]
    if missing:
        raise ValueError(f"config.json must give {', '.join(missing)}; it does not")
    sizes = {field: whole_number(config, name) for field, name in fields.items()}
    _check_layer_types(config, num_layers=sizes["num_layers"])
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    return sizes | {
        "num_kv_heads": whole_number(config, "num_key_value_heads", default=heads),
        "head_dim": whole_number(config, "head_dim", default=max(hidden // heads, 1)),
        "norm_eps": number(config, "rms_norm_eps"),
        "renormalise": switch(config, "norm_topk_prob", default=False),
        "rope_theta": rope_theta(config),
        "tied": switch(config, "tie_word_embeddings", default=False),
    }


def _check_layer_types(config: Mapping[str, Any], *, num_layers: int) -> None:
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * num_layers:
        raise ValueError(
            f"layer_types must be full_attention for each of {num_layers} layers; got {reprlib.repr(kinds)}"
        )


def head_dim_problems(architecture: Architecture) -> list[str]:
    """What is wrong where heads do not share out the hidden size."""
    a = architecture
    if a.head_dim * a.num_heads == a.hidden_size:
        return []
    return [
        f"a head must be hidden size / heads = {a.hidden_size}/{a.num_heads} wide (--kv-channels); got "
        f"{a.head_dim}: vLLM takes no other for this architecture"
    ]
