"""Flags of `pretrain_emo.py` that choose which experts of a checkpoint are trained, or in which order they are loaded.

The training code takes plain maps. This module reads Selections, placements and checkpoints, if a flag names one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from emo_megatron.config import raise_problems
from emo_megatron.mcore.finetune import Experts, TrainOnly, freeze_hook, place_when_loaded
from emo_megatron.mcore.unsupported import PLACEMENT, SELECTION, problems_of

if TYPE_CHECKING:
    from emo_megatron.checkpoint.reader import MegatronCheckpoint

Hook = Callable[[list[Any]], list[Any]]


def add_start_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags for the trained weights and for the order in which experts are loaded."""
    group = parser.add_argument_group("fine-tuning a module")
    group.add_argument(
        "--train-only",
        choices=get_args(TrainOnly),
        default="all",
        help="Weights to train. experts: the routed experts. experts+router: the routed experts and the routers. all: "
        "all weights. Other weights are frozen: they get no gradient and no weight decay. (default: all)",
    )
    group.add_argument(
        "--train-selection",
        type=Path,
        metavar="FILE",
        help="Train only some routed experts: those listed in FILE, a Selection that the command select has written. "
        "The Selection must be made from the checkpoint in --load. Requires --train-only experts and "
        "--no-save-optim. (default: none, all routed experts)",
    )
    parser.add_argument_group("placed experts").add_argument(
        "--expert-placement",
        type=Path,
        metavar="FILE",
        help="Reorder the experts while the weights are loaded. FILE is a placement that the command place has "
        "written; it must be made from the checkpoint in --load or --pretrained-checkpoint. A run starts with "
        "--finetune or --pretrained-checkpoint. The checkpoints of the run have the new order, so a resumed run does "
        "not need FILE. (default: none, the order of the checkpoint)",
    )
    return parser


def start_hooks(args: argparse.Namespace) -> list[Hook]:
    """Hooks for the flags of `add_start_args`; Megatron calls them with the model chunks before it loads them."""
    hooks: list[Hook] = []
    if args.train_selection is not None:
        experts, source = _selected(args)
        hooks += [freeze_hook(args.train_only, experts=experts), _checked_at_start(source)]
    elif args.train_only != "all":
        hooks.append(freeze_hook(args.train_only))
    if args.expert_placement is not None:
        hooks.append(_placed(args))
    return hooks


def _refuse(args: argparse.Namespace, rows: Any, flag: str) -> None:
    raise_problems(f"this run cannot have {flag}", problems_of(rows, args))


def _selected(args: argparse.Namespace) -> tuple[Experts, MegatronCheckpoint]:
    """The experts of --train-selection, and the checkpoint that the run loads, which must be the selection's model."""
    from emo_megatron.checkpoint.reader import metadata_of
    from emo_megatron.checkpoint.source import loaded_by_megatron
    from emo_megatron.experts.selection import load_selection

    _refuse(args, SELECTION, "--train-selection")
    selection = load_selection(args.train_selection)
    if selection.num_experts != args.num_experts:
        raise ValueError(
            f"--train-selection must be a Selection of a model with the experts of this run: {args.train_selection} is "
            f"of {selection.num_experts} experts, and --num-experts is {args.num_experts}"
        )
    source = loaded_by_megatron(args)
    metadata = metadata_of(source)
    try:
        selection.check_model(metadata.fingerprint, num_experts=metadata.num_experts, layers=metadata.layers)
    except ValueError as error:
        raise ValueError(f"--train-selection {args.train_selection}: {error}") from None
    return selection.by_layer, source


def _checked_at_start(source: MegatronCheckpoint) -> Hook:
    """A hook that checks at the first forward pass whether the weights are those of `source`."""
    from emo_megatron.checkpoint.source import check_routers_when_started

    def hook(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            check_routers_when_started(chunk, source)
        return chunks

    return hook


def _placed(args: argparse.Namespace) -> Hook:
    """A hook that loads the experts in the order of --expert-placement."""
    from emo_megatron.checkpoint.source import check_placement, check_router, is_run, loaded_by_megatron
    from emo_megatron.experts.placement import load_placement

    _refuse(args, PLACEMENT, "--expert-placement")
    if not args.finetune and args.pretrained_checkpoint is None:
        raise ValueError(
            "--expert-placement requires weights of another run: pass --load with --finetune, or "
            "--pretrained-checkpoint. When a run resumes, its experts are already in the new order: remove "
            "--expert-placement"
        )
    placement = load_placement(args.expert_placement)
    if placement.num_ranks != args.expert_model_parallel_size:
        raise ValueError(
            f"--expert-placement {args.expert_placement} requires --expert-model-parallel-size {placement.num_ranks}; "
            f"got --expert-model-parallel-size {args.expert_model_parallel_size}"
        )
    orders = placement.by_layer
    checks = {}
    # a resumed run loads its own checkpoint, whose experts are already in the new order
    if args.finetune or not is_run(args.load):
        source = loaded_by_megatron(args)
        check_placement(source, placement=placement)
        checks = {"check": lambda layer: check_router(layer, source)}

    def hook(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            place_when_loaded(chunk, orders, **checks)
        return chunks

    return hook
