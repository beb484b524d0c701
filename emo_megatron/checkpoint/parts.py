"""The checkpoints that modules are cut from and put together of, and what is refused about them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from emo_megatron.checkpoint.names import ROUTER, is_of_experts, refuse_prediction
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.experts.selection import Selection, load_selection, router_fingerprint

SELECTION_FILE = "selection.json"
"""In a module's folder: the experts it was cut from its parent with."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A checkpoint cut out of a parent, perhaps trained since."""

    name: str
    checkpoint: MegatronCheckpoint
    selection: Selection


def open_module(path: Path, *, name: str, selection: Path | None = None) -> Module:
    """A module's checkpoint and its Selection, by default the one that lies in its folder.

    Raises:
        ValueError: there is no Selection.
    """
    file = path / SELECTION_FILE if selection is None else selection
    if not file.exists():
        raise ValueError(
            f"{file} does not exist: the Selection that {path} was cut with says which experts its are; name it with "
            "--selections"
        )
    return Module(name=name, checkpoint=MegatronCheckpoint(path), selection=load_selection(file))


def open_parent(path: Path, selection: Selection | None) -> MegatronCheckpoint:
    """A checkpoint that experts can be taken from by number, and that this Selection was made of.

    Raises:
        ValueError: it has no routed experts, parts that cannot be cut, or is another model.
    """
    parent = MegatronCheckpoint(path)
    args = parent.args
    if not parent.moe_layers:
        raise ValueError(f"{path} has no routed experts")
    refuse_prediction(path, parent.names)
    for name in filter(is_of_experts, parent.names):
        if parent.names[name].shape[:1] != (args.num_experts,):
            raise ValueError(
                f"{path}: {name} has the shape {parent.names[name].shape}; {args.num_experts} experts were expected "
                "on its first axis"
            )
    if selection is not None:
        routers = (parent.layer_view(layer).read(f"{ROUTER}weight") for layer in parent.moe_layers)
        try:
            selection.check_model(router_fingerprint(routers), num_experts=args.num_experts, layers=parent.moe_layers)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return parent


def check_target(target: Selection, args: argparse.Namespace) -> None:
    """Refuse experts that Megatron's model cannot be made of.

    Raises:
        ValueError: layers keep different numbers, or fewer than a token uses.
    """
    kept = target.uniform_count(purpose="a Megatron checkpoint")
    if kept < args.moe_router_topk:
        raise ValueError(
            f"the Selection keeps {kept} routed experts a layer and a token uses {args.moe_router_topk} "
            f"(--moe-router-topk): select at least {args.moe_router_topk}"
        )


def check_fits(module: Module, model: MegatronCheckpoint, *, num_experts: int, fingerprint: str) -> None:
    """Refuse a module that was not cut from the same parent as this model.

    Args:
        module: in question.
        model: the parent, or another module of it.
        num_experts: the parent's routed experts.
        fingerprint: `router_fingerprint` of the parent.

    Raises:
        ValueError: another parent, other names or shapes.
    """
    selection, names = module.selection, module.checkpoint.names
    try:
        selection.check_model(fingerprint, num_experts=num_experts, layers=model.moe_layers)
    except ValueError as error:
        raise ValueError(f"{module.name} is a module of another parent: {error}") from None
    if set(names) != set(model.names):
        raise ValueError(
            f"{module.name} has other weights: only in one of them {sorted(set(names) ^ set(model.names))[:4]}"
        )
    kept = selection.uniform_count(purpose="a module")
    for name, info in names.items():
        wanted = model.names[name].shape
        if is_of_experts(name):
            wanted = (kept, *wanted[1:])
        if info.shape != wanted:
            raise ValueError(
                f"{module.name}: {name} has the shape {info.shape}, where {wanted} was expected; is --selection of "
                "this module?"
            )
