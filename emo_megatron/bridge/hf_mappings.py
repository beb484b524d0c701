"""Turn the mapping table of hf/mapping.py into Megatron-Bridge's mappings, for one format and one model."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from torch import Tensor, nn

from emo_megatron.hf.formats import Entry, Format, from_file, to_file
from emo_megatron.hf.mapping import TABLE, Architecture, Row

STACKED, GROUPED, ALONE = "mlp.experts.experts.", "mlp.experts.", "mlp.experts.local_experts.*."
"""Start of the names of experts: of the tensor in a checkpoint, and of the parameters of grouped and of local experts.

The parameters of grouped experts end in the expert's number.
"""
PER_LAYER = "model.layers.*.input_layernorm.weight"
"""Weight of the table that every layer has and that no adapter wraps; constants are exported with this weight."""


def mappings_of(format: Format, architecture: Architecture) -> list[MegatronParamMapping[Any]]:
    """Bridge's mappings for a model: one per row of the table; a row of experts has one per name of the parameter.

    Rows that the model or the format does not have are left out. Bridge itself adds the second name of a norm.
    """
    a = architecture
    entries = {entry.name: entry for entry in format.entries(a)}
    found = []
    # a format may name the shared expert as one of the experts: the more exact name must come first
    for row in sorted(TABLE, key=lambda row: row.is_of_experts):
        layers = a.dense_layers if row.layers == "dense" else a.moe_layers
        names = [format.name(weight, a) for weight in row.weights]
        entry = entries.get(_in_layer(names[0], layers[0])) if layers else None
        if entry is None or entry.weight is None:
            continue
        found += [_mapping(row, parameter, names, entry) for parameter in parameters_of(row)]
    return found


def parameters_of(row: Row) -> list[str]:
    """Names of the parameters in a row's tensor, with `*` for the layer and the expert."""
    if not row.is_of_experts:
        return [row.megatron]
    return [row.megatron.replace(STACKED, GROUPED) + "*", row.megatron.replace(STACKED, ALONE)]


def constants_of(format: Format, architecture: Architecture) -> dict[str, list[Entry]]:
    """The constants of a format, which Megatron does not have: name of the layer's weight PER_LAYER -> constants."""
    constants = [entry for entry in format.entries(architecture) if entry.weight is None]
    found: dict[str, list[Entry]] = {}
    for layer in range(architecture.num_layers):
        start = _in_layer("model.layers.*.", layer)
        carrier = _in_layer(format.name(PER_LAYER, architecture), layer)
        found[carrier] = [entry for entry in constants if entry.name.startswith(start)]
    assert sum(map(len, found.values())) == len(constants), "every constant belongs to a layer"
    return found


def _mapping(row: Row, parameter: str, names: list[str], entry: Entry) -> MegatronParamMapping[Any]:
    if row.kind == "qkv":
        return QKVMapping(parameter, *names)
    if row.kind == "gate_up":
        return GatedMLPMapping(parameter, *names)
    if entry.scale != 1.0 or entry.padding_rows:
        return ConvertedMapping(parameter, names[0], entry=entry)
    # AutoMapping decides by the class of the module, and other bridges register the shared expert as split
    return (ReplicatedMapping if row.needs == "shared_gate" else AutoMapping)(parameter, names[0])


def _in_layer(name: str, layer: int) -> str:
    """A name with `*` in one layer, of expert 0."""
    return name.replace("*", str(layer), 1).replace("*", "0")


class ConvertedMapping(AutoMapping):
    """The mapping of a weight that the format stores multiplied or with more rows, as `entry` says."""

    def __init__(
        self, megatron_param: str, hf_param: str, permute_dims: tuple[int, ...] | None = None, *, entry: Entry
    ) -> None:
        super().__init__(megatron_param, hf_param, permute_dims)
        self.entry = dataclasses.replace(entry, name=hf_param)

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: nn.Module) -> Tensor:
        """The parameter, split over ranks, in a tensor of the format."""
        result: Tensor = super().hf_to_megatron(from_file(self.entry, hf_weights), megatron_module)
        return result

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """The tensor of the format, gathered from the ranks; ValueError if the values do not fit into the dtype."""
        found = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: self._stored(tensor) for name, tensor in found.items()}

    def megatron_to_hf_quant(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Not supported, because the factor would be lost."""
        raise NotImplementedError(
            f"export_hf_weights_quant must not be used for models with {self.hf_param}, whose stored value differs "
            "from Megatron's: export with save_hf_pretrained, and quantize the exported folder"
        )

    def resolve(self, captures: tuple[str, ...]) -> ConvertedMapping:
        """This mapping with numbers instead of `*`."""
        megatron_param, hf_param = self._resolve_names(captures)
        return type(self)(megatron_param, hf_param, self.permute_dims, entry=self.entry)

    def _stored(self, tensor: Tensor) -> Tensor:
        return to_file(self.entry, lambda _: tensor, dtype=tensor.dtype)
