"""The weights of a running Megatron model by the names and numbers that its checkpoint has, on any layout."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from emo_megatron.checkpoint.names import EXPERTS, ROUTER
from emo_megatron.finite import NotFiniteError, check_weight

_EXPERT = re.compile(
    # the experts of the local layers; of Transformer Engine's; and those in one parameter
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.)?(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<grouped>\d*)"
)


def check_weights(model: torch.nn.Module) -> None:
    """Refuse a model with a weight that is not finite, on whichever rank. Every rank calls."""
    found: str | None = None
    try:
        for name, layer, experts, tensor in model_weights(model):
            check_weight(name, tensor, layer=layer, experts=experts)
    except NotFiniteError as error:
        found = str(error)
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    for said in told:
        if said is not None:
            raise NotFiniteError(said)


def model_weights(model: torch.nn.Module) -> Iterator[tuple[str, int | None, int | Sequence[int], Tensor]]:
    """Parameters and stored buffers of this rank, in the model's order.

    Yields:
        The name, as `MegatronCheckpoint.names` has it; the layer, from 1, None outside the layers; the routed expert it
        is of, or those on its first axis, by the numbers of the whole model; this rank's part of the weight.
    """
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if re.fullmatch(r"decoder\.layers\.\d+", name)
    }
    for name, tensor in _stored(model):
        prefix = ".".join(name.split(".")[:3])
        if prefix not in layers:
            yield name, None, (), tensor
            continue
        layer, rest = layers[prefix], name.removeprefix(f"{prefix}.")
        number = int(layer.layer_number)
        experts: int | Sequence[int] = ()
        if expert := _EXPERT.fullmatch(rest):
            rest = EXPERTS + expert["rest"]
            own = _own_experts(layer)
            local = expert["local"] or expert["grouped"]
            experts = own[int(local)] if local else own
        elif rest.startswith(ROUTER) and tensor.dim():
            experts = range(len(tensor))
        # a checkpoint of local layers names a norm by the projection that it feeds
        submodules = getattr(layer, "submodules_config", None)
        for ours, stored in getattr(submodules, "sharded_state_dict_keys_map", {}).items():
            if rest.startswith(ours):
                rest = stored + rest.removeprefix(ours)
        yield f"decoder.layers.{number - 1}.{rest}", number, experts, tensor


def _own_experts(layer: Any) -> list[int]:
    """Numbers, in the whole model, of the experts that this rank has of a layer."""
    assert isinstance(layer.mlp, MoELayer)
    return list(layer.mlp.local_expert_indices)


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    # others, such as masks, may hold infinities on purpose
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)
