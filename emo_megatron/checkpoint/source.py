"""The checkpoint that a model's weights come from: which one Megatron loads, and the check that it did.

Megatron is given the folder of a run and finds the iteration by itself; where it finds none, it goes on with random
weights. So a path that was opened here is handed to Megatron in a form that leaves nothing to find, and what a training
run will load is found here by Megatron's own rules.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from emo_megatron.checkpoint.names import ROUTER
from emo_megatron.checkpoint.reader import RELEASE, TRACKER, MegatronCheckpoint, tracked_folder
from emo_megatron.experts.placement import Placement
from emo_megatron.finite import check_weight


@contextlib.contextmanager
def run_with(folder: Path) -> Iterator[Path]:
    """A run's folder, for --load, whose only checkpoint is `folder`, whatever its name and whatever lies beside it."""
    with tempfile.TemporaryDirectory(prefix="emo_megatron.") as name:
        run = Path(name)
        (run / TRACKER).write_text(RELEASE)
        (run / RELEASE).symlink_to(folder.absolute(), target_is_directory=True)
        yield run


def is_run(path: str | None) -> bool:
    """Whether Megatron takes a path for the folder of a run that has saved."""
    return path is not None and (Path(path) / TRACKER).is_file()


def loaded_by_megatron(args: argparse.Namespace) -> MegatronCheckpoint:
    """The checkpoint that a training run will load, by the rules of Megatron's `load_checkpoint` for its flags."""
    flag, path = "--load", args.load
    if args.pretrained_checkpoint is not None and not is_run(path):
        flag, path = "--pretrained-checkpoint", args.pretrained_checkpoint
    if path is None:
        raise ValueError("no checkpoint is loaded: name it with --load")
    folder = tracked_folder(Path(path))
    # a tracker that says "release" wins over --ckpt-step; --pretrained-checkpoint must have a tracker
    is_release = folder is not None and folder.name == RELEASE
    if args.ckpt_step and not is_release and (folder or flag == "--load"):
        folder = Path(path) / f"iter_{args.ckpt_step:07d}"
    if folder is None:
        raise ValueError(
            f"{flag} {path} has no {TRACKER}, so Megatron would load nothing and start from random weights: name the "
            "folder that --save named"
        )
    return MegatronCheckpoint(folder)


def check_router(layer: MoELayer, checkpoint: MegatronCheckpoint) -> None:
    """Refuse a layer whose router is not the checkpoint's."""
    number = layer.layer_number
    prefix = f"decoder.layers.{number - 1}.{ROUTER}"
    found = {name: tensor.detach().cpu() for name, tensor in layer.router.state_dict().items()}
    wanted = {n.removeprefix(prefix): checkpoint.read(n) for n in checkpoint.names if n.startswith(prefix)}
    for name, tensor in wanted.items():
        # NaN is not even itself
        check_weight(f"{ROUTER}{name}", tensor, layer=number, experts=range(len(tensor)))
    # a bias of the experts is stored beside the weight, and chooses as much
    is_same = "weight" in wanted and all(
        name in found and torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items()
    )
    if not is_same:
        raise ValueError(
            f"Megatron did not load {checkpoint.path}: the router of layer {number} is not the one stored there"
        )


def check_routers(model: Any, checkpoint: MegatronCheckpoint) -> None:
    """`check_router` for every MoE layer of this process's part of a model; multi-token prediction's count apart."""
    for layer in model.decoder.modules():
        if isinstance(layer, MoELayer):
            check_router(layer, checkpoint)


def check_routers_when_started(model: Any, checkpoint: MegatronCheckpoint) -> None:
    """`check_routers` at the first forward pass of a model that is not loaded yet."""

    def check(*_: Any) -> None:
        first_forward.remove()
        check_routers(model, checkpoint)

    first_forward = model.register_forward_pre_hook(check)


def check_placement(parent: MegatronCheckpoint, *, placement: Placement) -> None:
    """Refuse a placement of another model, and a model whose experts' numbers mean something."""
    args = parent.args
    try:
        placement.check_model(parent.fingerprint, layers=parent.moe_layers)
    except ValueError as error:
        raise ValueError(f"{parent.path}: {error}") from None
    for name, most, why in (
        ("pool_forced", 0, "the last experts are in every pool"),
        ("moe_router_num_groups", 1, "experts are routed in groups of neighbours"),
    ):
        if (getattr(args, name, None) or 0) > most:
            raise ValueError(
                f"the run was trained with --{name.replace('_', '-')} {getattr(args, name)}: {why}, and other numbers "
                "would make another model of it"
            )
