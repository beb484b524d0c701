"""Find the checkpoint that Megatron will load, and check that Megatron loaded this checkpoint.

Megatron receives the folder of a run and chooses the iteration. If Megatron finds no iteration, Megatron continues with
random weights. Therefore commands pass Megatron a folder with only one checkpoint. For a training run, this module
finds the checkpoint by Megatron's own rules.
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

from emo_megatron.checkpoint.folders import RELEASE, TRACKER, tracked_folder
from emo_megatron.checkpoint.names import ROUTER
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.experts.placement import Placement
from emo_megatron.finite import check_weight


@contextlib.contextmanager
def run_with(folder: Path) -> Iterator[Path]:
    """A temporary folder for --load, whose only checkpoint is `folder`."""
    with tempfile.TemporaryDirectory(prefix="emo_megatron.") as name:
        run = Path(name)
        (run / TRACKER).write_text(RELEASE)
        (run / RELEASE).symlink_to(folder.absolute(), target_is_directory=True)
        yield run


def is_run(path: str | None) -> bool:
    """Whether Megatron accepts a path as the folder of a run with a checkpoint."""
    return path is not None and (Path(path) / TRACKER).is_file()


def loaded_by_megatron(args: argparse.Namespace) -> MegatronCheckpoint:
    """The checkpoint that a training run with these flags will load, by the rules of Megatron's `load_checkpoint`."""
    flag, path = "--load", args.load
    if args.pretrained_checkpoint is not None and not is_run(path):
        flag, path = "--pretrained-checkpoint", args.pretrained_checkpoint
    if path is None:
        raise ValueError("the run must load a checkpoint, and the flags name none: name it with --load")
    folder = tracked_folder(Path(path))
    # a tracker with "release" overrides --ckpt-step; --pretrained-checkpoint must have a tracker
    is_release = folder is not None and folder.name == RELEASE
    if args.ckpt_step and not is_release and (folder or flag == "--load"):
        folder = Path(path) / f"iter_{args.ckpt_step:07d}"
    if folder is None:
        raise ValueError(
            f"{flag} must name a folder with {TRACKER}; {path} has none, so Megatron would start from random weights: "
            "name the folder that --save named"
        )
    return MegatronCheckpoint(folder)


def check_router(layer: MoELayer, checkpoint: MegatronCheckpoint) -> None:
    """Raise ValueError if the router of a layer differs from the router in the checkpoint."""
    number = number_of(layer)
    prefix = checkpoint.routers.get(number, f"decoder.layers.{number - 1}.{ROUTER}")
    found = {name: tensor.detach().cpu() for name, tensor in layer.router.state_dict().items()}
    wanted = {n.removeprefix(prefix): checkpoint.read(n) for n in checkpoint.names if n.startswith(prefix)}
    for name, tensor in wanted.items():
        # NaN is not equal to NaN, so the comparison below would fail without naming the cause
        check_weight(f"{ROUTER}{name}", tensor, layer=number, experts=range(len(tensor)))
    # the router's stored expert bias also affects the choice of experts
    is_same = "weight" in wanted and all(
        name in found and torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items()
    )
    if not is_same:
        raise ValueError(
            f"Megatron did not load {checkpoint.path}: the router of layer {number} differs from the stored router"
        )


def number_of(layer: MoELayer) -> int:
    """The number of a layer in `MegatronCheckpoint.routers`; Megatron numbers multi-token prediction from 1 again."""
    router = getattr(layer.router, "to_wrap", layer.router)
    # with --mtp-use-repeated-layer one layer has one number per depth, and is stored as the layer of the first depth
    return int(getattr(router, "layer_numbers", (layer.layer_number,))[0])


def check_routers(model: Any, checkpoint: MegatronCheckpoint) -> None:
    """`check_router` for every MoE layer in this process."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            check_router(layer, checkpoint)


def check_routers_when_started(model: Any, checkpoint: MegatronCheckpoint) -> None:
    """Run `check_routers` at the first forward pass, for a model that is not loaded yet."""

    def check(*_: Any) -> None:
        first_forward.remove()
        check_routers(model, checkpoint)

    first_forward = model.register_forward_pre_hook(check)


def check_placement(parent: MegatronCheckpoint, *, placement: Placement) -> None:
    """Raise ValueError for a placement of another model, and for a model that depends on the order of experts."""
    args = parent.args
    try:
        placement.check_model(parent.fingerprint, layers=parent.moe_layers)
    except ValueError as error:
        raise ValueError(f"{parent.path}: {error}") from None
    for name, most, why in (
        ("pool_forced", 0, "the last experts are in every pool"),
        ("moe_router_num_groups", 1, "experts with neighbouring numbers form groups"),
    ):
        if (getattr(args, name, None) or 0) > most:
            raise ValueError(
                f"the model must not depend on the order of experts; the run had --{name.replace('_', '-')} "
                f"{getattr(args, name)}: {why}, so a new order would be another model"
            )
