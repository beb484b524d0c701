"""What a run does with the weights of another: train a part of them only, or put the experts in another order.

The part is the routed experts, all or some of them, alone or with the routers. Everything else is frozen before
Megatron wraps the model, so that frozen weights get no gradient, no optimizer state and no weight decay.

Experts are put in order as weights are loaded, and nothing is written. Router rows change places on every rank, experts
between expert-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from emo_megatron.mcore.compat import training_args

# the experts of the local layers, and of Transformer Engine's
_EXPERT = re.compile(r"local_experts\.(\d+)\..+|linear_fc[12]\.(?:weight|bias)(\d+)")

TrainOnly = Literal["experts", "experts+router", "all"]
Experts = Mapping[int, Collection[int]]
"""Number of an MoE layer -> experts of the whole model."""
Orders = Mapping[int, tuple[int, ...]]
"""Number of an MoE layer -> the expert, of the whole model, that comes to each place."""


def freeze_hook(policy: TrainOnly, *, experts: Experts | None = None) -> Callable[[list[Any]], list[Any]]:
    """`freeze` for Megatron to call with the model's chunks before it wraps them."""

    def hook(chunks: list[Any]) -> list[Any]:
        if _over_stage(sum(freeze(chunk, policy=policy, experts=experts) for chunk in chunks)) == 0:
            raise ValueError(
                f"--train-only {policy} leaves this pipeline stage nothing to train: give every stage an MoE layer"
            )
        return chunks

    return hook


def freeze(model: torch.nn.Module, *, policy: TrainOnly, experts: Experts | None = None) -> int:
    """Freeze all that the policy does not name, in a pipeline stage's chunk of a model that is not wrapped yet.

    With `experts` only these of the routed experts stay trainable. Returns how many parameters (numbers) of this rank
    do.
    """
    if policy != "all":
        model.requires_grad_(False)
        for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
            if experts is not None and layer.layer_number not in experts:
                raise ValueError(
                    f"--train-selection names the MoE layers {(*experts,)}; the model has one at {layer.layer_number}"
                )
            if policy == "experts+router":
                layer.router.requires_grad_(True)
            for expert, parameter in expert_parameters(layer):
                parameter.requires_grad_(experts is None or expert in experts[layer.layer_number])
        embedding = getattr(model, "embedding", None)
        if embedding is not None:
            # a checkpointed layer is differentiated only if one of its inputs needs a gradient
            embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(torch.is_grad_enabled()))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _over_stage(number: int) -> int:
    """The sum over the ranks of this pipeline stage: one of them may have none of the experts that are trained."""
    if not parallel_state.model_parallel_is_initialized():
        return number
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    total = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def expert_parameters(layer: MoELayer) -> list[tuple[int, Tensor]]:
    """This rank's parameters of routed experts, with the number that each expert has in the whole model."""
    found = []
    for name, parameter in layer.experts.named_parameters():
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise ValueError(f"the experts' weights lie in one parameter ({name}): drop --moe-single-grouped-weight")
        found.append((layer.local_expert_indices[int(match[1] or match[2])], parameter))
    return found


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
                "has more than the model; --expert-placement cannot tell which are placed. Use reorder"
            )
        check(layer)
        place_experts(layer, order=order)
        is_placed = True

    def started(*_: Any) -> None:
        if _starts_from_weights() and not is_placed:
            raise RuntimeError(
                f"layer {layer.layer_number}: --expert-placement placed nothing, for no weights came through "
                "load_state_dict. Use reorder"
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
