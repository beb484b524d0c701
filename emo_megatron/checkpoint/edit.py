"""Write a checkpoint with some of the experts, with the experts in another order, or with experts of trained modules.

Extraction, reordering, composition and merging use the same code with two different choices: the experts of the result
in each layer, and the source of each weight (parent or module). Only one chunk of the result is in memory at a time. A
report lists the weights that several modules changed differently, and the source of each such weight.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_megatron.checkpoint.names import ROUTER, is_of_experts, split_name
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, Note, write_checkpoint
from emo_megatron.config import PoolConfig
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.finite import check_weight
from emo_megatron.json_files import to_json

SELECTION_FILE = "selection.json"
"""File in a module's folder: the Selection of the parent's experts that the module keeps."""
REPORT_FILE = "report.json"
PARENT, AVERAGE, OWNER, REFUSE = "parent", "average", "owner", "refuse"
"""Policies for the value of a weight. The name of a module is also a policy."""
GROUPS = ("moe_router_num_groups", "moe_router_group_topk")
GROUPS_OF_PARENT = "emo_groups_of_parent"
"""Attribute of a module's flags: the parent's flags in GROUPS. The module itself has no groups of experts."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A checkpoint that was extracted from a parent, and may have been trained since."""

    name: str
    checkpoint: MegatronCheckpoint
    selection: Selection

    def row_of(self, layer: int, expert: int) -> int | None:
        """Index in the module of an expert of the parent; `layer` counts from 1. None: the module lacks the expert."""
        kept = self.selection.experts[self.selection.layers.index(layer)]
        return kept.index(expert) if expert in kept else None


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The source of each weight. Each policy is "parent", "average" or the name of a module.

    A module is a candidate for a weight if the module has the weight and changed the weight. Without a parent there is
    no comparison, and every module that has the weight is a candidate. If a policy names a module that is not a
    candidate, the parent's value is used.
    """

    shared: str = PARENT
    """Policy for every weight that does not belong to a routed expert."""
    router: str = OWNER
    """Policy for an expert's row of the router; "owner": the source of the expert itself."""
    conflict: str = REFUSE
    """Policy for experts that several modules changed differently; "refuse" is an error instead."""
    blend: float = 1.0
    """Share in (0, 1] of the module's value in a linear blend with the parent's value; below 1 requires the parent."""


def open_parent(path: Path, selection: Selection | None = None, *, file: Path | None = None) -> MegatronCheckpoint:
    """Open a checkpoint, and check that experts can be taken out by number and that the Selection matches the model.

    `file` is the file of the Selection, for the error message.
    """
    parent = MegatronCheckpoint(path)
    if not parent.moe_layers:
        raise ValueError(f"{path} must have routed experts; the model has none: name another checkpoint")
    num_experts = int(parent.args.num_experts)
    for name in filter(is_of_experts, parent.names):
        if parent.names[name].shape[:1] != (num_experts,):
            raise ValueError(
                f"{path}: the first axis of {name} must be the {num_experts} experts; got the shape "
                f"{parent.names[name].shape}"
            )
    if selection is not None:
        try:
            parent.check_selection(selection, num_experts=num_experts)
        except ValueError as error:
            raise ValueError(f"{path if file is None else f'{file} for {path}'}: {error}") from None
    return parent


def open_modules(paths: Sequence[Path], selections: Sequence[Path] = ()) -> list[Module]:
    """The modules in some folders, with their Selections: by default SELECTION_FILE in the folder of each module."""
    if selections and len(selections) != len(paths):
        raise ValueError(
            f"--selections must name one file per module; got {len(selections)} files for {len(paths)} modules"
        )
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        # policies and the report name modules, so each module needs a unique name
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"--modules must name different folders; got {', '.join(names)}")
    if taken := {PARENT, AVERAGE, OWNER, REFUSE}.intersection(names):
        raise ValueError(
            f"--modules must not name a folder like a policy; got the folder {taken.pop()}: rename the folder"
        )
    found = []
    for path, name, file in zip(paths, names, selections or [p / SELECTION_FILE for p in paths], strict=True):
        if not file.exists():
            raise ValueError(f"{file} does not exist: name the Selection file of the module {path} with --selections")
        found.append(Module(name=name, checkpoint=MegatronCheckpoint(path), selection=load_selection(file)))
    return found


class CheckpointEdit:
    """The weights of a new checkpoint, the result.

    Args:
        parent: None if the modules contain every expert of the result.
        experts: for each layer number, from 1, the parent's experts in the order of the result; None: all experts.
        modules: of one parent.
        policies: the source of each weight.
    """

    def __init__(
        self,
        *,
        parent: MegatronCheckpoint | None,
        experts: Mapping[int, Sequence[int]] | None = None,
        modules: Sequence[Module] = (),
        policies: Policies | None = None,
    ) -> None:
        self._parent, self._modules, self._policies = parent, modules, policies or Policies()
        self._model = modules[0].checkpoint if parent is None else parent
        self._num_parent_experts = modules[0].selection.num_experts if parent is None else int(parent.args.num_experts)
        everything = dict.fromkeys(self._model.moe_layers, tuple(range(self._num_parent_experts)))
        self._experts = everything if experts is None else experts
        self.num_experts = len(next(iter(self._experts.values())))
        """Routed experts per layer of the result."""
        self._conflicts: list[dict[str, Any]] = []
        self._left_out: list[dict[str, Any]] = []
        self._changed: dict[str, int] = {}
        self._check_policies()
        for module in modules:
            self._check_module(module)
        self._check_experts()

    def write(self, output: Path, *, notes: Mapping[str, Note] | None = None) -> Path:
        """Write the result as a checkpoint of weights: without optimizer state, at iteration 0.

        Args:
            output: the folder; must not exist. With modules, the report is written into the folder too.
            notes: more files for the folder, by name.
        """
        weights = {}
        for name, info in self._model.names.items():
            shape, experts = info.shape, self._experts_of(name)
            shape = (self.num_experts, *shape[1:]) if experts else shape
            rows = functools.partial(self._rows, name)
            weights[name] = LazyWeight(shape=shape, dtype=info.dtype, rows=rows, experts=experts)
        notes = {**(notes or {}), **({REPORT_FILE: self._write_report} if self._modules else {})}
        return write_checkpoint(output, weights, args=self._args(), notes=notes)

    def _args(self) -> argparse.Namespace:
        """The parent's flags with the result's number of experts. A result with fewer experts has no pools or groups.

        The kept experts would form groups of unequal sizes, and a module is small enough for one node.
        """
        args = copy.copy(self._model.args)
        args.num_experts = self.num_experts
        if self.num_experts < self._num_parent_experts:
            for option in dataclasses.fields(PoolConfig):
                if hasattr(args, option.name):
                    setattr(args, option.name, option.default)
            if getattr(args, "moe_router_num_groups", None):
                setattr(args, GROUPS_OF_PARENT, {name: getattr(args, name) for name in GROUPS})
            for name in GROUPS:
                setattr(args, name, None)
        elif self._parent is None:
            # the modules together have all experts of the parent: the result gets the parent's groups again
            vars(args).update(vars(args).pop(GROUPS_OF_PARENT, {}))
        return args

    def _write_report(self, path: Path) -> None:
        """Write the report.

        `conflicts`: weights that modules changed differently, and the source of the value in the result. `left_out`:
        weights that modules changed without disagreement, but the result has the parent's value. `changed`: for each
        kind of weight, the number of tensors or experts' rows that differ from the parent's.
        """
        names, has_parent = [m.name for m in self._modules], self._parent is not None
        said = dataclasses.asdict(self._policies) | {"modules": names, "has_parent": has_parent}
        said |= {"conflicts": self._conflicts, "left_out": self._left_out, "changed": self._changed}
        path.write_text(to_json(said, indent=1) + "\n", encoding="utf-8")

    def _experts_of(self, name: str) -> Sequence[int]:
        """The parent's experts on the first axis of a weight of the result; empty for a weight of no routed expert."""
        return self._experts[self._model.layer_of(name)] if is_of_experts(name) else ()

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part [start, stop) of a weight of the result, along the first axis."""
        experts = self._experts_of(name)[start:stop]
        if not self._modules:
            assert self._parent is not None
            return _read(self._parent, name, experts or slice(start, stop), experts=experts)
        if experts:
            return torch.stack([self._value(name, expert) for expert in experts])
        return self._value(name, slice(start, stop))

    def _value(self, name: str, index: int | slice) -> Tensor:
        """Part of a weight in the result: one expert, by its number in the parent, or a slice of another weight."""
        expert = index if isinstance(index, int) else None
        of = () if expert is None else expert
        parent = None if self._parent is None else _read(self._parent, name, index, experts=of)
        layer, changed = self._model.layer_of(name), {}
        for module in self._modules:
            row = index if expert is None else module.row_of(layer, expert)
            if row is not None:
                value = _read(module.checkpoint, name, row, experts=of)
                if parent is None or not torch.equal(value, parent):
                    changed[module.name] = value
        return self._decide(name, expert, changed=changed, parent=parent)

    def _decide(self, name: str, expert: int | None, *, changed: dict[str, Tensor], parent: Tensor | None) -> Tensor:
        """Choose a value by the policies, and record the choice for the report."""
        layer, kind = split_name(name, num_layers=self._model.num_layers)
        values = list(changed.values())
        disagree = any(not torch.equal(values[0], value) for value in values[1:])
        policy = self._policies.shared
        if expert is not None:
            policy = self._policies.router if kind.startswith(ROUTER) else OWNER
        if policy == OWNER:
            policy = self._policies.conflict if disagree else next(iter(changed), PARENT)
        if policy == REFUSE:
            raise ValueError(
                f"{' and '.join(changed)} changed expert {expert} of layer {layer} ({name}) differently: choose the "
                "value with --conflict (parent, average or the name of a module); the report lists every such expert"
            )
        if parent is None and policy not in (AVERAGE, *changed):
            raise ValueError(
                f"--router or --conflict {policy} does not have expert {expert} of layer {layer} ({name}): add "
                "--parent, which has all experts, or choose another policy"
            )
        value, source = value_of(policy, candidates=changed, parent=parent)
        if parent is not None:
            value = blended(value, parent=parent, share=self._policies.blend)
        where: dict[str, Any] = {"weight": name} | ({} if expert is None else {"expert": expert})
        where |= {"modules": list(changed), "taken": source}
        if disagree:
            # in float32: the difference of two values may overflow their own dtype
            spread = max(float((other.float() - value.float()).abs().max()) for other in values)
            self._conflicts.append(where | {"max_difference": spread})
        elif changed and source == PARENT:
            self._left_out.append(where)
        if parent is not None and not torch.equal(value, parent):
            self._changed[kind] = self._changed.get(kind, 0) + 1
        return value

    def _check_experts(self) -> None:
        """Raise ValueError if Megatron cannot have these experts per layer, or if no source has one of the experts."""
        numbers, top_k = {len(kept) for kept in self._experts.values()}, self._model.args.moe_router_topk
        if len(numbers) > 1 or min(numbers) < top_k:
            raise ValueError(
                f"every MoE layer must keep the same number of experts, at least --moe-router-topk {top_k}; the "
                f"Selection keeps {min(numbers)} to {max(numbers)} experts per layer: select again with --keep"
            )
        for layer, experts in self._experts.items() if self._parent is None else ():
            for expert in experts:
                if all(module.row_of(layer, expert) is None for module in self._modules):
                    raise ValueError(f"no module has expert {expert} of layer {layer}: add --parent, which has all")

    def _check_policies(self) -> None:
        policies, names = self._policies, [module.name for module in self._modules]
        if not 0.0 < policies.blend <= 1.0:
            raise ValueError(f"--blend must lie in (0, 1]; got {policies.blend}")
        special = {"shared": [], "router": [OWNER], "conflict": [REFUSE]}
        chosen = {option: getattr(policies, option) for option in special}
        if self._parent is None and (PARENT in chosen.values() or policies.blend != 1.0):
            raise ValueError(
                "--shared parent, --router parent, --conflict parent and --blend below 1 require --parent: add "
                "--parent, or choose other policies"
            )
        for option, value in chosen.items():
            known = [PARENT, AVERAGE, *special[option], *names]
            if value not in known:
                raise ValueError(f"--{option} must be one of {', '.join(known)}; got {value!r}")

    def _check_module(self, module: Module) -> None:
        """Raise ValueError if a module was not extracted from the same parent."""
        selection, names, wanted = module.selection, module.checkpoint.names, self._model.names
        fingerprint = self._modules[0].selection.model
        try:
            self._model.check_selection(selection, num_experts=self._num_parent_experts, parent=fingerprint)
        except ValueError as error:
            raise ValueError(f"{module.name} is a module of another parent: {error}") from None
        if names.keys() != wanted.keys():
            only = sorted(names.keys() ^ wanted.keys())[:4]
            raise ValueError(
                f"{module.name} and its parent must have weights of the same names; only one of the two has {only}: "
                "name another folder with --modules"
            )
        kept = selection.uniform_count(purpose="a module")
        for name, info in names.items():
            shape = (kept, *wanted[name].shape[1:]) if is_of_experts(name) else wanted[name].shape
            if info.shape != shape:
                raise ValueError(
                    f"{module.name}: {name} must have the shape {shape}; got {info.shape}: check that --selections "
                    "names the Selection of this module"
                )


def value_of(policy: str, *, candidates: Mapping[str, Tensor], parent: Tensor | None) -> tuple[Tensor, str]:
    """The value of a weight under a policy, and the source: the name of a module, "average" or "parent".

    Args:
        policy: "parent"; "average", the mean of the candidates, computed in float32; or the name of a module.
        candidates: the values of the modules that have the weight and changed the weight, by module.
        parent: the parent's value, used if the policy names no candidate.
    """
    if policy in candidates:
        return candidates[policy], policy
    if policy == AVERAGE and candidates:
        values = list(candidates.values())
        return torch.stack([value.float() for value in values]).mean(dim=0).to(values[0].dtype), AVERAGE
    assert parent is not None, policy
    return parent, PARENT


def blended(value: Tensor, *, parent: Tensor, share: float) -> Tensor:
    """parent + share * (value - parent), computed in float32; a share of 1 returns `value` itself."""
    return value if share == 1.0 else torch.lerp(parent.float(), value.float(), share).to(value.dtype)


def _read(
    checkpoint: MegatronCheckpoint, name: str, index: int | slice | Sequence[int], *, experts: int | Sequence[int]
) -> Tensor:
    """A part of a weight. NotFiniteError if a value is not finite, because NaN cannot be compared with the parent.

    `experts` are the numbers, in the parent, of the experts in this part, for the error message.
    """
    part = checkpoint.read(name, index)
    check_weight(f"{name} of {checkpoint.path}", part, layer=checkpoint.layer_of(name) or None, experts=experts)
    return part
