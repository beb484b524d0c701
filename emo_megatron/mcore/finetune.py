"""Options of a run that starts from the weights of another run: train only a part of the weights, or reorder experts.

The trained part is the routed experts, all or some of them, with or without the routers. All other weights are frozen
before Megatron wraps the model. Frozen weights therefore get no gradient, no optimizer state and no weight decay.

Experts are reordered while weights are loaded, and no file is written. Every rank reorders its router rows;
expert-parallel ranks exchange experts.
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

# names of expert weights in local layers and in Transformer Engine's layers
_EXPERT = re.compile(r"local_experts\.(\d+)\..+|linear_fc[12]\.(?:weight|bias)(\d+)")

TrainOnly = Literal["experts", "experts+router", "all"]
Experts = Mapping[int, Collection[int]]
"""Number of an MoE layer -> indices of experts in the whole model."""
Orders = Mapping[int, tuple[int, ...]]
"""Number of an MoE layer -> for each new index of an expert, the old index of that expert in the whole model."""


def freeze_hook(policy: TrainOnly, *, experts: Experts | None = None) -> Callable[[list[Any]], list[Any]]:
    """A hook that calls `freeze`. Megatron calls the hook with the model's chunks before wrapping the chunks."""

    def hook(chunks: list[Any]) -> list[Any]:
        if _over_stage(sum(freeze(chunk, policy=policy, experts=experts) for chunk in chunks)) == 0:
            raise ValueError(
                f"--train-only {policy} leaves this pipeline stage no weights to train: give every stage an MoE layer"
            )
        return chunks

    return hook


def freeze(model: torch.nn.Module, *, policy: TrainOnly, experts: Experts | None = None) -> int:
    """Freeze all weights that `policy` does not name, in one chunk of a pipeline stage that is not wrapped yet.

    With `experts`, only these routed experts stay trainable. Returns the number of trainable weights (numbers, not
    tensors) on this rank.
    """
    if policy != "all":
        model.requires_grad_(False)
        for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
            if experts is not None and layer.layer_number not in experts:
                raise ValueError(
                    f"--train-selection must have all MoE layers; got {(*experts,)}, without layer {layer.layer_number}"
                )
            if policy == "experts+router":
                layer.router.requires_grad_(True)
            for expert, parameter in expert_parameters(layer):
                parameter.requires_grad_(experts is None or expert in experts[layer.layer_number])
        embedding = getattr(model, "embedding", None)
        if embedding is not None:
            # a checkpointed layer gets gradients only if one of the layer's inputs requires a gradient
            embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(torch.is_grad_enabled()))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _over_stage(number: int) -> int:
    """The sum over the ranks of this pipeline stage, because a single rank may hold none of the trained experts."""
    if not parallel_state.model_parallel_is_initialized():
        return number
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    total = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def expert_parameters(layer: MoELayer) -> list[tuple[int, Tensor]]:
    """This rank's parameters of routed experts, each with the expert's index in the whole model."""
    found = []
    for name, parameter in layer.experts.named_parameters():
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise ValueError(
                f"one parameter holds the weights of several experts ({name}); drop --moe-single-grouped-weight"
            )
        found.append((layer.local_expert_indices[int(match[1] or match[2])], parameter))
    return found


def place_when_loaded(
    model: torch.nn.Module, orders: Orders, *, check: Callable[[MoELayer], None] = lambda layer: None
) -> None:
    """Reorder the experts of every MoE layer as soon as the weights of another run are loaded.

    A layer raises RuntimeError at its first forward pass if no weights were loaded, and while loading if weights are
    loaded twice. `check` is called with each layer after loading and before reordering, and may raise an error.
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
            # some loaded tensors are the model's own, which are already reordered, and others are copies
            raise RuntimeError(
                f"layer {layer.layer_number}: weights were loaded twice, as Megatron does if the checkpoint has "
                "fewer or more weights than the model; --expert-placement supports one load only. Reorder the "
                "checkpoint instead: python -m emo_megatron reorder"
            )
        check(layer)
        place_experts(layer, order=order)
        is_placed = True

    def started(*_: Any) -> None:
        if _starts_from_weights() and not is_placed:
            raise RuntimeError(
                f"layer {layer.layer_number}: --expert-placement placed nothing, because load_state_dict loaded no "
                "weights. Reorder the checkpoint instead: python -m emo_megatron reorder"
            )
        first_forward.remove()

    layer.register_load_state_dict_post_hook(loaded)
    first_forward = layer.register_forward_pre_hook(started)


def _starts_from_weights() -> bool:
    args = training_args()
    # Megatron also sets this flag when it falls back to --pretrained-checkpoint
    return args is None or bool(args.finetune)


@torch.no_grad()
def place_experts(layer: MoELayer, *, order: tuple[int, ...]) -> None:
    """Reorder a layer's experts. Every expert-parallel rank must call this function after loading its weights."""
    for tensor in (*layer.router.parameters(), *layer.router.buffers()):
        if tensor.dim() and len(tensor) == len(order):
            tensor.copy_(tensor[list(order)])
    of_experts: dict[int, list[Tensor]] = {}
    for expert, parameter in expert_parameters(layer):
        of_experts.setdefault(expert, []).append(parameter)
    # one kind of weight at a time, because a rank briefly holds the weights of all experts
    for own in zip(*(of_experts[e] for e in sorted(of_experts)), strict=True):
        here = torch.stack([parameter.data for parameter in own])
        parts = [torch.empty_like(here) for _ in range(layer.ep_group.size())]
        torch.distributed.all_gather(parts, here, group=layer.ep_group)
        every = torch.cat(parts)
        for place, parameter in zip(sorted(of_experts), own, strict=True):
            parameter.copy_(every[order[place]])
