"""Write a checkpoint's model with other experts: some of them, another order, or those that modules have trained.

Extraction, reordering, composition and merging back are one thing with other choices: which experts the result has in
each layer, and whose value each weight gets. Only a chunk of the result is in memory at a time. What modules changed
and whose value was taken is counted in a report; nothing is decided silently.
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

from emo_megatron.checkpoint.names import ROUTER, is_of_experts, refuse_prediction, split_name
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, Note, write_checkpoint
from emo_megatron.config import PoolConfig
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.finite import check_weight
from emo_megatron.json_files import to_json

SELECTION_FILE = "selection.json"
"""In a module's folder: the experts it was cut from its parent with."""
REPORT_FILE = "report.json"
PARENT, AVERAGE, OWNER, REFUSE = "parent", "average", "owner", "refuse"
"""Policies for a weight's value, besides the name of a module."""
GROUPS = ("moe_router_num_groups", "moe_router_group_topk")
GROUPS_OF_PARENT = "emo_groups_of_parent"
"""Attribute of a module's flags: its parent's groups of experts, which the module does not have."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A checkpoint cut out of a parent, perhaps trained since."""

    name: str
    checkpoint: MegatronCheckpoint
    selection: Selection

    def row_of(self, layer: int, expert: int) -> int | None:
        """Where the module has an expert of its parent, by the layer's number; None: it does not have it."""
        kept = self.selection.experts[self.selection.layers.index(layer)]
        return kept.index(expert) if expert in kept else None


@dataclass(frozen=True, kw_only=True)
class Policies:
    """Whose value a weight gets. Each is "parent", "average" or a module's name.

    A module counts where it has the weight and changed it; without a parent to compare with, where it has it. The
    parent's value stands where a policy names a module that does not.
    """

    shared: str = PARENT
    """Everything that is not an expert's."""
    router: str = OWNER
    """An expert's row of the router; "owner": as the expert itself."""
    conflict: str = REFUSE
    """Experts that several modules changed differently; "refuse" stops instead."""
    blend: float = 1.0
    """Share of the way from the parent's value to a module's, in (0, 1]; below 1 it needs the parent."""


def open_parent(path: Path, selection: Selection | None = None) -> MegatronCheckpoint:
    """A checkpoint that experts can be taken from by number, and that this Selection was made of."""
    parent = MegatronCheckpoint(path)
    if not parent.moe_layers:
        raise ValueError(f"{path} has no routed experts")
    refuse_prediction(path, parent.names)
    num_experts = int(parent.args.num_experts)
    for name in filter(is_of_experts, parent.names):
        if parent.names[name].shape[:1] != (num_experts,):
            raise ValueError(f"{path}: {name} has the shape {parent.names[name].shape}, not of {num_experts} experts")
    if selection is not None:
        try:
            selection.check_model(parent.fingerprint, num_experts=num_experts, layers=parent.moe_layers)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return parent


def open_modules(paths: Sequence[Path], selections: Sequence[Path] = ()) -> list[Module]:
    """Modules' checkpoints, each with the Selection it was cut with: by default the one that lies in its folder."""
    if selections and len(selections) != len(paths):
        raise ValueError(f"--selections must name one file for each module: {len(selections)} for {len(paths)}")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        # policies and the report name modules, so each needs a name of its own
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"--modules must be different folders; got {', '.join(names)}")
    if taken := {PARENT, AVERAGE, OWNER, REFUSE}.intersection(names):
        raise ValueError(f"--modules names a folder {taken.pop()}, which is the name of a policy: rename the folder")
    found = []
    for path, name, file in zip(paths, names, selections or [p / SELECTION_FILE for p in paths], strict=True):
        if not file.exists():
            raise ValueError(f"{file} does not exist: name the Selection that {path} was cut with by --selections")
        found.append(Module(name=name, checkpoint=MegatronCheckpoint(path), selection=load_selection(file)))
    return found


class CheckpointEdit:
    """The weights of a result.

    Args:
        parent: None where modules have all that is wanted.
        experts: by the layer's number, from 1, the parent's experts that the result has, in its order; None: all.
        modules: of one parent.
        policies: whose value a weight gets.
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
        """Routed experts of the result in each layer."""
        self._conflicts: list[dict[str, Any]] = []
        self._left_out: list[dict[str, Any]] = []
        self._changed: dict[str, int] = {}
        self._check_policies()
        for module in modules:
            self._check_module(module)
        self._check_experts()

    def write(self, output: Path, *, notes: Mapping[str, Note] | None = None) -> Path:
        """Write the result as a checkpoint of weights: a fresh optimizer, iteration 0.

        Args:
            output: the folder; must not exist. With modules it also gets the report.
            notes: more files for it, by name.
        """
        weights = {}
        for name, info in self._model.names.items():
            shape, experts = info.shape, self._experts[split_name(name)[0]] if is_of_experts(name) else ()
            shape = (self.num_experts, *shape[1:]) if experts else shape
            rows = functools.partial(self._rows, name)
            weights[name] = LazyWeight(shape=shape, dtype=info.dtype, rows=rows, experts=experts)
        notes = {**(notes or {}), **({REPORT_FILE: self._write_report} if self._modules else {})}
        return write_checkpoint(output, weights, args=self._args(), notes=notes)

    def _args(self) -> argparse.Namespace:
        """Flags of the result: the parent's with its number of experts; no pools and no groups in a smaller one.

        Experts that were chosen leave groups of other sizes, and a module is small enough for one node.
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
            # of modules that are the whole model again
            vars(args).update(vars(args).pop(GROUPS_OF_PARENT, {}))
        return args

    def _write_report(self, path: Path) -> None:
        """Write what was decided while the result was written.

        `conflicts`: weights that modules changed differently, and whose value was taken. `left_out`: weights that
        modules changed, all alike, and the result has as the parent. `changed`: by kind of weight, the tensors or
        experts' rows that differ from the parent's.
        """
        names, has_parent = [m.name for m in self._modules], self._parent is not None
        said = dataclasses.asdict(self._policies) | {"modules": names, "has_parent": has_parent}
        said |= {"conflicts": self._conflicts, "left_out": self._left_out, "changed": self._changed}
        path.write_text(to_json(said, indent=1) + "\n", encoding="utf-8")

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a weight of the result along its first axis."""
        experts = self._experts[split_name(name)[0]][start:stop] if is_of_experts(name) else ()
        if not self._modules:
            assert self._parent is not None
            return _read(self._parent, name, experts or slice(start, stop), experts=experts)
        if experts:
            return torch.stack([self._value(name, expert) for expert in experts])
        return self._value(name, slice(start, stop))

    def _value(self, name: str, index: int | slice) -> Tensor:
        """What the result has of a weight: one expert's, by its number in the parent; or a slice of another weight."""
        expert = index if isinstance(index, int) else None
        of = () if expert is None else expert
        parent = None if self._parent is None else _read(self._parent, name, index, experts=of)
        layer, changed = split_name(name)[0], {}
        for module in self._modules:
            row = index if expert is None else module.row_of(layer, expert)
            if row is not None:
                value = _read(module.checkpoint, name, row, experts=of)
                if parent is None or not torch.equal(value, parent):
                    changed[module.name] = value
        return self._decide(name, expert, changed=changed, parent=parent)

    def _decide(self, name: str, expert: int | None, *, changed: dict[str, Tensor], parent: Tensor | None) -> Tensor:
        """Take a value by the policies, and note what was decided."""
        layer, kind = split_name(name)
        values = list(changed.values())
        disagree = any(not torch.equal(values[0], value) for value in values[1:])
        policy = self._policies.shared
        if expert is not None:
            policy = self._policies.router if kind.startswith(ROUTER) else OWNER
        if policy == OWNER:
            policy = self._policies.conflict if disagree else next(iter(changed), PARENT)
        if policy == REFUSE:
            raise ValueError(
                f"{' and '.join(changed)} changed expert {expert} of layer {layer} ({name}) differently: say with "
                "--conflict whose to take (parent, average or a module's name); the report then lists every one"
            )
        if parent is None and policy not in (AVERAGE, *changed):
            raise ValueError(
                f"--router or --conflict {policy} does not have expert {expert} of layer {layer} ({name}): give "
                "--parent, which has all, or another policy"
            )
        value, source = value_of(policy, candidates=changed, parent=parent)
        if parent is not None:
            value = blended(value, parent=parent, share=self._policies.blend)
        where: dict[str, Any] = {"weight": name} | ({} if expert is None else {"expert": expert})
        where |= {"modules": list(changed), "taken": source}
        if disagree:
            # two halves of a narrow range may be further apart than it is wide
            spread = max(float((other.float() - value.float()).abs().max()) for other in values)
            self._conflicts.append(where | {"max_difference": spread})
        elif changed and source == PARENT:
            self._left_out.append(where)
        if parent is not None and not torch.equal(value, parent):
            self._changed[kind] = self._changed.get(kind, 0) + 1
        return value

    def _check_experts(self) -> None:
        """Refuse experts that Megatron's model cannot be made of, or that nobody has."""
        numbers, top_k = {len(kept) for kept in self._experts.values()}, self._model.args.moe_router_topk
        if len(numbers) > 1 or min(numbers) < top_k:
            raise ValueError(
                f"every layer of a Megatron model needs as many experts, at least --moe-router-topk {top_k}; the "
                f"Selection keeps {min(numbers)} to {max(numbers)}: select again with --keep"
            )
        for layer, experts in self._experts.items() if self._parent is None else ():
            for expert in experts:
                if all(module.row_of(layer, expert) is None for module in self._modules):
                    raise ValueError(f"no module has expert {expert} of layer {layer}: give --parent, which has all")

    def _check_policies(self) -> None:
        policies, names = self._policies, [module.name for module in self._modules]
        if not 0.0 < policies.blend <= 1.0:
            raise ValueError(f"--blend must lie in (0, 1]; got {policies.blend}")
        special = {"shared": [], "router": [OWNER], "conflict": [REFUSE]}
        chosen = {option: getattr(policies, option) for option in special}
        if self._parent is None and (PARENT in chosen.values() or policies.blend != 1.0):
            raise ValueError("a policy takes values of the parent: give --parent, or another policy")
        for option, value in chosen.items():
            known = [PARENT, AVERAGE, *special[option], *names]
            if value not in known:
                raise ValueError(f"--{option} must be one of {', '.join(known)}; got {value!r}")

    def _check_module(self, module: Module) -> None:
        """Refuse a module that was not cut from the same parent."""
        selection, names, wanted = module.selection, module.checkpoint.names, self._model.names
        fingerprint = self._modules[0].selection.model
        try:
            selection.check_model(fingerprint, num_experts=self._num_parent_experts, layers=self._model.moe_layers)
        except ValueError as error:
            raise ValueError(f"{module.name} is a module of another parent: {error}") from None
        if names.keys() != wanted.keys():
            only = sorted(names.keys() ^ wanted.keys())[:4]
            raise ValueError(f"{module.name} has other weights: only in one of them {only}")
        kept = selection.uniform_count(purpose="a module")
        for name, info in names.items():
            shape = (kept, *wanted[name].shape[1:]) if is_of_experts(name) else wanted[name].shape
            if info.shape != shape:
                raise ValueError(
                    f"{module.name}: {name} has the shape {info.shape}, where {shape} was expected; is --selections of "
                    "this module?"
                )


def value_of(policy: str, *, candidates: Mapping[str, Tensor], parent: Tensor | None) -> tuple[Tensor, str]:
    """A weight's value under a policy, and whose it is: a module's name, "average" or "parent".

    Args:
        policy: "parent"; "average", the mean of the candidates, formed in float32; or a module's name.
        candidates: the values of the modules that have the weight and changed it, by module.
        parent: the parent's value, which stands where the policy names no candidate.
    """
    if policy in candidates:
        return candidates[policy], policy
    if policy == AVERAGE and candidates:
        values = list(candidates.values())
        return torch.stack([value.float() for value in values]).mean(dim=0).to(values[0].dtype), AVERAGE
    assert parent is not None, policy
    return parent, PARENT


def blended(value: Tensor, *, parent: Tensor, share: float) -> Tensor:
    """`share` of the way from the parent's value to `value`, formed in float32; 1 gives `value` itself."""
    return value if share == 1.0 else torch.lerp(parent.float(), value.float(), share).to(value.dtype)


def _read(
    checkpoint: MegatronCheckpoint, name: str, index: int | slice | Sequence[int], *, experts: int | Sequence[int]
) -> Tensor:
    """A part of a weight, which must be finite, or nothing could be said of what a module changed.

    `experts` are the parent's numbers of those that it is of, for the error.
    """
    part = checkpoint.read(name, index)
    check_weight(f"{name} of {checkpoint.path}", part, layer=split_name(name)[0] or None, experts=experts)
    return part
