"""Start a run with placed experts: the weights of a checkpoint are put in a placement's order as they are loaded.

Nothing is written: router rows change places on every rank, experts between expert-parallel ranks. `relabel` makes a
checkpoint of the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.commands.relabel import check_placement
from emo_megatron.experts.placement import Placement, load_placement
from emo_megatron.mcore.compat import training_args
from emo_megatron.mcore.finetune import expert_parameters
from emo_megatron.mcore.source import check_router, is_run, loaded_by_megatron
from emo_megatron.mcore.unsupported import PLACEMENT_REFUSALS


def add_placement_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flag that names a placement."""
    group = parser.add_argument_group("placed experts")
    group.add_argument(
        "--expert-placement",
        type=Path,
        metavar="FILE",
        help="A file of `place`, made of the model in --load or --pretrained-checkpoint: its experts are loaded in "
        "that order. For the start of a run, with --finetune or --pretrained-checkpoint; its checkpoints keep it.",
    )
    return parser


def placement_hook(args: argparse.Namespace) -> Callable[[list[Any]], list[Any]] | None:
    """What Megatron calls with the model's chunks before it wraps and loads them; None without a placement.

    Args:
        args: Megatron's parsed flags with that of `add_placement_args`.

    Raises:
        ValueError: the run does not start from another's weights or could not place them (PLACEMENT_REFUSALS), or the
            placement is of another model or layout.
    """
    if args.expert_placement is None:
        return None
    problems = [
        row.message(getattr(args, row.field))
        for row in PLACEMENT_REFUSALS
        if hasattr(args, row.field) and not row.allows(getattr(args, row.field))
    ]
    if problems:
        raise ValueError("this run cannot place experts:\n" + "\n".join(f"  - {p}" for p in problems))
    if not args.finetune and args.pretrained_checkpoint is None:
        raise ValueError(
            "--expert-placement needs weights of another run: --load with --finetune, or --pretrained-checkpoint. "
            "A run that goes on has its experts in the new order already"
        )
    placement = load_placement(args.expert_placement)
    if placement.num_ranks != args.expert_model_parallel_size:
        raise ValueError(
            f"--expert-placement {args.expert_placement} is for {placement.num_ranks} ranks; got "
            f"--expert-model-parallel-size {args.expert_model_parallel_size}"
        )
    # a run that goes on loads its own checkpoint, and nothing is placed
    source = None if is_run(args.load) and not args.finetune else loaded_by_megatron(args)
    if source is not None:
        check_placement(source, placement=placement)

    def hook(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            place_when_loaded(chunk, placement=placement, source=source)
        return chunks

    return hook


def place_when_loaded(
    model: torch.nn.Module, *, placement: Placement, source: MegatronCheckpoint | None = None
) -> None:
    """Put the experts of every MoE layer in the placement's order when another run's weights were loaded.

    A layer raises RuntimeError at its first forward pass if that never happened, and when such weights come twice;
    ValueError when they are not those of `source`, where it is given.
    """
    orders = dict(zip(placement.layers, placement.order, strict=True))
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        _Placing(layer, order=orders[layer.layer_number], source=source)


class _Placing:
    """A layer that waits for the weights to place."""

    def __init__(self, layer: MoELayer, *, order: tuple[int, ...], source: MegatronCheckpoint | None) -> None:
        self.order, self.source = order, source
        self.is_placed = False
        layer.register_load_state_dict_post_hook(self._loaded)
        self.first_forward = layer.register_forward_pre_hook(self._started)

    def _loaded(self, layer: MoELayer, _: Any) -> None:
        if not _starts_from_weights():
            return
        if self.is_placed:
            # of what is loaded, some tensors are the model's own, placed by now, and others are copies
            raise RuntimeError(
                f"layer {layer.layer_number}: weights were loaded twice, as Megatron does where a checkpoint lacks or "
                "has more than the model; --expert-placement cannot tell which are placed. Use relabel"
            )
        if self.source is not None:
            check_router(layer, self.source)
        place_experts(layer, order=self.order)
        self.is_placed = True

    def _started(self, layer: MoELayer, _: Any) -> None:
        if _starts_from_weights() and not self.is_placed:
            raise RuntimeError(
                f"layer {layer.layer_number}: --expert-placement placed nothing, for no weights came through "
                "load_state_dict. Use relabel"
            )
        self.first_forward.remove()


def _starts_from_weights() -> bool:
    args = training_args()
    # Megatron sets this where it falls back to --pretrained-checkpoint
    return args is None or bool(args.finetune)


@torch.no_grad()
def place_experts(layer: MoELayer, *, order: tuple[int, ...]) -> None:
    """Put a layer's experts in this order; every expert-parallel rank calls.

    Args:
        layer: with its weights loaded.
        order: the expert, of the whole model, that comes to each place.
    """
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
