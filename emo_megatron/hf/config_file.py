"""Fields of config.json: checks of their types, and the fields that both formats share."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from emo_megatron.hf.mapping import Architecture
from emo_megatron.json_files import is_a
from emo_megatron.mcore.unsupported import only

RECORD = "emo_megatron"
"""Key of the settings that only Megatron needs; every Hugging Face loader ignores this key."""
MOST = 2**31 - 1
"""Largest accepted size of a model."""
SILU = only("hidden_act", "silu", None, why="the imported Megatron model computes MLPs as down(silu(gate) * up)")
"""A row for both formats; null has the same effect as leaving the field out."""
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
}
"""Fields of `Architecture` -> fields of config.json."""


def whole_number(config: Mapping[str, Any], name: str, *, least: int = 1, default: int | None = None) -> int:
    """A size or a count. A field that is absent or null gives `default`, or ValueError if `default` is None."""
    value = _given(config, name, default)
    if not is_a(value, int) or not least <= value <= MOST:
        raise _wrong(name, f"a whole number, {least} or more", value)
    return int(value)


def whole_numbers(config: Mapping[str, Any], name: str, *, below: int = MOST + 1) -> list[int]:
    """Counts in [0, below); an empty list if the field is absent."""
    value = _given(config, name, [])
    if not isinstance(value, list) or not all(is_a(n, int) and 0 <= n < below for n in value):
        raise _wrong(name, f"a list of whole numbers in [0, {below})", value)
    return value


def number(config: Mapping[str, Any], name: str, *, of: str = "") -> float:
    """A number above 0; `of` is the name of the field that holds the object `config`, for errors."""
    value = _given(config, name, None)
    if not is_a(value, float) or value <= 0:
        raise _wrong(f"{of}.{name}".lstrip("."), "a number above 0", value)
    return float(value)


def switch(config: Mapping[str, Any], name: str, *, of: str = "") -> bool:
    """True or false; false if the field is absent. `of` as for `number`."""
    value = _given(config, name, False)
    if not isinstance(value, bool):
        raise _wrong(f"{of}.{name}".lstrip("."), "true or false", value)
    return value


def record(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object; empty if the field is absent."""
    value = _given(config, name, {})
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is None and default is None:
        raise ValueError(f"config.json must give {name}; the field is missing: add the field")
    return default if value is None else value


def _wrong(name: str, wanted: str, value: object) -> ValueError:
    return ValueError(f"{name} must be {wanted}; got {reprlib.repr(value)}")


def common_config(architecture: Architecture) -> dict[str, Any]:
    """The fields of config.json that have the same name in both formats."""
    a = architecture
    return {
        **{name: getattr(a, field) for field, name in SIZES.items()},
        "num_key_value_heads": a.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "norm_topk_prob": a.renormalise,
        "tie_word_embeddings": a.tied,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def common_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Architecture` whose names in config.json are the same in both formats."""
    missing = [name for name in (*SIZES.values(), "rms_norm_eps", "norm_topk_prob") if name not in config]
    if missing:
        raise ValueError(f"config.json must give {', '.join(missing)}; these fields are missing: add them")
    sizes = {field: whole_number(config, name) for field, name in SIZES.items()}
    num_layers, heads = sizes["num_layers"], sizes["num_heads"]
    kinds = config.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * num_layers:
        raise _wrong("layer_types", f"full_attention in each of the {num_layers} layers", kinds)
    return sizes | {
        "num_kv_heads": whole_number(config, "num_key_value_heads", default=heads),
        "head_dim": whole_number(config, "head_dim", default=max(sizes["hidden_size"] // heads, 1)),
        "norm_eps": number(config, "rms_norm_eps"),
        "renormalise": switch(config, "norm_topk_prob"),
        "rope_theta": _rope_theta(config),
        "tied": switch(config, "tie_word_embeddings"),
    }


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary positions, from the field of transformers 4 or of transformers 5."""
    parameters, scaling = record(config, "rope_parameters"), record(config, "rope_scaling")
    if parameters and scaling and parameters != scaling:
        # transformers lets rope_scaling win, and says nothing
        raise ValueError(
            f"rope_parameters and rope_scaling must be equal if config.json has both; got {reprlib.repr(parameters)} "
            f"and {reprlib.repr(scaling)}: remove the one with which the model was not trained"
        )
    parameters = parameters or scaling
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type must be 'default' (rotary positions without scaling); got {reprlib.repr(kind)}")
    if "rope_theta" not in parameters:
        return number(config, "rope_theta")
    return number(parameters, "rope_theta", of="rope_parameters")
