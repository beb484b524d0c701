"""Put the experts of a model in another order as the weights of another run are loaded; nothing is written.

Router rows change places on every rank, experts between expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from emo_megatron.mcore.compat import training_args
from emo_megatron.mcore.finetune import expert_parameters

Orders = Mapping[int, tuple[int, ...]]
"""Number of an MoE layer -> the expert, of the whole model, that comes to each place."""


def place_when_loaded(
    model: torch.nn.Module, orders: Orders, *, check: Callable[[MoELayer], None] = lambda layer: None
) -> None:
    """Put the experts of every MoE layer in order when another run's weights were loaded.

    A layer raises RuntimeError at its first forward pass if that never happened, and when such weights come twice; and
    what `check`, called with a layer that is loaded and not placed yet, raises.
    """
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        _place_when_loaded(layer, orders[layer.layer_number], check)


def _place_when_loaded(layer: MoELayer, order: tuple[int, ...], check: Callable[[MoELayer], None]) -> None:
    is_placed = False

    def loaded(*_: Any) -> None:
        nonlocal is_placed
        if not _starts_from_weights():
            return
        if is_placed:
            # of what is loaded, some tensors are the model's own, placed by now, and others are copies
            raise RuntimeError(
                f"layer {layer.layer_number}: weights were loaded twice, as Megatron does where a checkpoint lacks or "
                "has more than the model; --expert-placement cannot tell which are placed. Use relabel"
            )
        check(layer)
        place_experts(layer, order=order)
        is_placed = True

    def started(*_: Any) -> None:
        if _starts_from_weights() and not is_placed:
            raise RuntimeError(
                f"layer {layer.layer_number}: --expert-placement placed nothing, for no weights came through "
                "load_state_dict. Use relabel"
            )
        first_forward.remove()

    layer.register_load_state_dict_post_hook(loaded)
    first_forward = layer.register_forward_pre_hook(started)


def _starts_from_weights() -> bool:
    args = training_args()
    # Megatron sets this where it falls back to --pretrained-checkpoint
    return args is None or bool(args.finetune)


@torch.no_grad()
def place_experts(layer: MoELayer, *, order: tuple[int, ...]) -> None:
    """Put a layer's experts in this order; every expert-parallel rank calls, with its weights loaded."""
    for tensor in (*layer.router.parameters(), *layer.router.buffers()):
        if tensor.dim() and len(tensor) == len(order):
            tensor.copy_(tensor[list(order)])
    of_experts: dict[int, list[Tensor]] = {}
    for expert, parameter in expert_parameters(layer):
        of_experts.setdefault(expert, []).append(parameter)
    # one kind of weight at a time: a rank has all experts' in memory for a moment
    for own in zip(*(of_experts[e] for e in sorted(of_experts)), strict=True):
        here = torch.stack([parameter.data for parameter in own])
        parts = [torch.empty_like(here) for _ in range(layer.ep_group.size())]
        torch.distributed.all_gather(parts, here, group=layer.ep_group)
        every = torch.cat(parts)
        for place, parameter in zip(sorted(of_experts), own, strict=True):
            parameter.copy_(every[order[place]])
