"""What a Hugging Face format is: its configuration, its tensors, and what it cannot express."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from emo_megatron.modules.hf.architecture import ATTENTION, MLP, Architecture, weight_shapes
from emo_megatron.modules.hf.entries import Entry

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
        Entry(name=rename(weight), shape=shape, weight=weight)
        for weight, shape in weight_shapes(architecture).items()
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
        f"{name} must be {value!r}; got {config[name]!r}"
        for name, value in wanted.items()
        if config.get(name) not in (None, value)
    ]


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary positions, where transformers 4 or 5 keeps it.

    Raises:
        ValueError: positions are scaled.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions must not be scaled; config.json has rope_type {kind!r}")
    theta = parameters.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json must give rope_theta; it does not")
    return float(theta)


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
        ValueError: naming every field that config.json lacks.
    """
    fields = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "renormalise": "norm_topk_prob",
    }
    missing = [name for name in fields.values() if name not in config]
    if missing:
        raise ValueError(f"config.json must give {', '.join(missing)}; it does not")
    sizes = {field: config[name] for field, name in fields.items()}
    heads = config["num_attention_heads"]
    return sizes | {
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": rope_theta(config),
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def head_dim_problems(architecture: Architecture) -> list[str]:
    """What is wrong where heads do not share out the hidden size."""
    a = architecture
    if a.head_dim * a.num_heads == a.hidden_size:
        return []
    return [
        f"a head must be hidden size / heads = {a.hidden_size}/{a.num_heads} wide (--kv-channels); got "
        f"{a.head_dim}: vLLM takes no other for this architecture"
    ]
