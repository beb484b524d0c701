"""What a training run starts from: the flags of `pretrain_emo.py` that choose experts of a checkpoint, or place them.

Training takes plain maps; Selections, placements and checkpoints are read here, and only where a flag names one.
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
    """Flags that say which weights are trained, and in what order experts are loaded."""
    group = parser.add_argument_group("fine-tuning a module")
    group.add_argument(
        "--train-only",
        choices=get_args(TrainOnly),
        default="all",
        help="Routed experts, also the router, or everything. What is frozen gets no gradient and no weight decay.",
    )
    group.add_argument(
        "--train-selection",
        type=Path,
        metavar="FILE",
        help="With --train-only experts and --no-save-optim: of the experts only those of this Selection, made of the "
        "model in --load.",
    )
    parser.add_argument_group("placed experts").add_argument(
        "--expert-placement",
        type=Path,
        metavar="FILE",
        help="A file of `place`, made of the model in --load or --pretrained-checkpoint: its experts are loaded in "
        "that order. For the start of a run, with --finetune or --pretrained-checkpoint; its checkpoints keep it.",
    )
    return parser


def start_hooks(args: argparse.Namespace) -> list[Hook]:
    """What Megatron calls with the model's chunks before it wraps and loads them, by the flags of `add_start_args`."""
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
    """The experts of --train-selection, and the checkpoint they are of, which is the one that is loaded."""
    from emo_megatron.checkpoint.reader import metadata_of
    from emo_megatron.checkpoint.source import loaded_by_megatron
    from emo_megatron.experts.selection import load_selection

    _refuse(args, SELECTION, "--train-selection")
    selection = load_selection(args.train_selection)
    if selection.num_experts != args.num_experts:
        raise ValueError(
            f"--train-selection {args.train_selection} is of a model of {selection.num_experts} experts, and "
            f"--num-experts is {args.num_experts}"
        )
    source = loaded_by_megatron(args)
    metadata = metadata_of(source)
    try:
        selection.check_model(metadata.fingerprint, num_experts=metadata.num_experts, layers=metadata.layers)
    except ValueError as error:
        raise ValueError(f"--train-selection {args.train_selection}: {error}") from None
    return selection.by_layer, source


def _checked_at_start(source: MegatronCheckpoint) -> Hook:
    """At the first forward pass: the weights are those of the checkpoint that was looked at."""
    from emo_megatron.checkpoint.source import check_routers_when_started

    def hook(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            check_routers_when_started(chunk, source)
        return chunks

    return hook


def _placed(args: argparse.Namespace) -> Hook:
    """The experts of the other run's weights come in the order of --expert-placement."""
    from emo_megatron.checkpoint.source import check_placement, check_router, is_run, loaded_by_megatron
    from emo_megatron.experts.placement import load_placement

    _refuse(args, PLACEMENT, "--expert-placement")
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
    orders = placement.by_layer
    checks = {}
    # a run that goes on loads its own checkpoint, and nothing is placed
    if args.finetune or not is_run(args.load):
        source = loaded_by_megatron(args)
        check_placement(source, placement=placement)
        checks = {"check": lambda layer: check_router(layer, source)}

    def hook(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            place_when_loaded(chunk, orders, **checks)
        return chunks

    return hook
