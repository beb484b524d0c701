"""Make Bridge's registry of mappings from the table of hf/mapping.py: `python -m support.bridge_mapping`.

Importing this module imports Bridge, from the folder that comes first on PYTHONPATH (tests/bridge/conftest.py).
"""

from __future__ import annotations

from typing import Any

from emo_megatron.mcore import cpu

cpu.activate()

from support.bridge_stand_ins import stand_ins  # noqa: E402

with stand_ins():
    from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
    from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping

from emo_megatron.hf.mapping import TABLE, Row  # noqa: E402

KINDS = {"plain": AutoMapping, "doubled": AutoMapping, "qkv": QKVMapping, "gate_up": GatedMLPMapping}


def parameter(row: Row) -> str:
    """The name that Bridge gives the parameter of a module."""
    return row.megatron.replace("experts.experts.", "experts.") + "*" * row.is_of_experts


def numbered(name: str) -> str:
    """In layer 3, and of expert 5."""
    return name.replace("*", "3", 1).replace("*", "5")


def main() -> None:
    """Look every name up, both ways."""
    registry = MegatronMappingRegistry(*(KINDS[row.kind](parameter(row), *row.weights) for row in TABLE))
    for row in TABLE:
        name, weights = numbered(parameter(row)), [numbered(weight) for weight in row.weights]
        found: Any = registry.megatron_to_hf_lookup(name).hf_param
        assert ([*found.values()] if isinstance(found, dict) else [found]) == weights, (name, found)
        for weight in weights:
            assert registry.hf_to_megatron_lookup(weight).megatron_param == name, weight
    norm = registry.megatron_to_hf_lookup("decoder.layers.1.pre_mlp_layernorm.weight")
    assert norm.hf_param == "model.layers.1.post_attention_layernorm.weight"
    print(f"{len(TABLE)} rows")


if __name__ == "__main__":
    main()
