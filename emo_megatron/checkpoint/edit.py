"""Put a model together from a parent and modules cut out of it, expert by expert, while it is written.

Extraction, composition and merging back are one thing with other choices: which experts the result has, and whose value
each weight gets. Only a chunk of the result is in memory at a time. What differed and what was done about it is counted
in a report; nothing is decided silently.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_megatron.checkpoint.names import ROUTER, is_of_experts, split_name
from emo_megatron.checkpoint.parts import Module, check_fits
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, Note, write_checkpoint
from emo_megatron.config import PoolConfig
from emo_megatron.experts.compose import AVERAGE, OWNER, PARENT, REFUSE, blended, value_of
from emo_megatron.experts.selection import Selection
from emo_megatron.finite import check_weight
from emo_megatron.json_files import to_json

REPORT_FILE = "report.json"
GROUPS = ("moe_router_num_groups", "moe_router_group_topk")
GROUPS_OF_PARENT = "emo_groups_of_parent"
"""Attribute of a module's flags: its parent's groups of experts, which the module does not have."""


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


@dataclass(kw_only=True)
class Report:
    """What was decided; filled while the result is written."""

    conflicts: list[dict[str, Any]] = field(default_factory=list)
    """Weights that modules changed differently, and whose value was taken."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Weights that modules changed, all alike, and the result has as the parent."""
    changed: dict[str, int] = field(default_factory=dict)
    """By kind of weight: tensors, or rows of an expert, that differ from the parent's."""


class Assembly:
    """The weights of a result.

    Args:
        parent: None where modules have all that is wanted.
        modules: of one parent.
        target: the result's experts; None: all of the parent's.
        policies: whose value a weight gets.

    Raises:
        ValueError: the parts do not fit, or a policy needs a part that is not there.
    """

    def __init__(
        self, *, parent: MegatronCheckpoint | None, modules: list[Module], target: Selection | None, policies: Policies
    ) -> None:
        self.parent, self.modules, self.policies = parent, modules, policies
        self.model = parent if parent is not None else modules[0].checkpoint
        self.num_parent_experts = (
            int(parent.args.num_experts) if parent is not None else modules[0].selection.num_experts
        )
        everything = [tuple(range(self.num_parent_experts))] * len(self.model.moe_layers)
        kept = everything if target is None else target.experts
        self._experts = dict(zip(self.model.moe_layers, kept, strict=True))
        self._rows = {
            module.name: {
                layer: {expert: row for row, expert in enumerate(experts)}
                for layer, experts in zip(module.selection.layers, module.selection.experts, strict=True)
            }
            for module in modules
        }
        self.report = Report()
        self._check()

    @property
    def num_experts(self) -> int:
        """Routed experts of the result, a layer."""
        return len(next(iter(self._experts.values())))

    def weights(self) -> dict[str, LazyWeight]:
        """The result, by the names that checkpoints are written with."""
        result = {}
        for name, info in self.model.names.items():
            of_experts = is_of_experts(name)
            shape = (self.num_experts, *info.shape[1:]) if of_experts else info.shape
            rows = functools.partial(self._expert_rows if of_experts else self._shared, name)
            experts = self._experts[split_name(name)[0]] if of_experts else ()
            result[name] = LazyWeight(shape=shape, dtype=info.dtype, rows=rows, experts=experts)
        return result

    def args(self) -> argparse.Namespace:
        """Flags of the result: the parent's with its number of experts; no pools and no groups in a smaller one.

        Experts that were chosen leave groups of other sizes, and a module is small enough for one node.
        """
        args = copy.copy(self.model.args)
        args.num_experts = self.num_experts
        if self.num_experts < self.num_parent_experts:
            for option in dataclasses.fields(PoolConfig):
                if hasattr(args, option.name):
                    setattr(args, option.name, option.default)
            if getattr(args, "moe_router_num_groups", None):
                setattr(args, GROUPS_OF_PARENT, {name: getattr(args, name) for name in GROUPS})
            for name in GROUPS:
                setattr(args, name, None)
        elif self.parent is None:
            # of modules that are the whole model again
            vars(args).update(vars(args).pop(GROUPS_OF_PARENT, {}))
        return args

    def write(self, output: Path, *, notes: Mapping[str, Note]) -> Path:
        """Write the result, its report and `notes` into one folder."""

        def report(path: Path) -> None:
            described = dataclasses.asdict(self.policies) | {
                "modules": [m.name for m in self.modules],
                "has_parent": self.parent is not None,
            }
            text = to_json(described | dataclasses.asdict(self.report), indent=1)
            path.write_text(text + "\n", encoding="utf-8")

        if self.modules:
            notes = {**notes, REPORT_FILE: report}
        return write_checkpoint(output, self.weights(), args=self.args(), notes=notes)

    def _expert_rows(self, name: str, start: int, stop: int) -> Tensor:
        layer, rest = split_name(name)
        experts = self._experts[layer][start:stop]
        if not self.modules:
            assert self.parent is not None
            return _read(self.parent, name, experts, experts=experts)
        policy = self.policies.router if rest.startswith(ROUTER) else OWNER
        return torch.stack([self._row(name, layer, expert, policy=policy) for expert in experts])

    def _row(self, name: str, layer: int, expert: int, *, policy: str) -> Tensor:
        candidates = {
            module.name: self._row_of(module, name, layer, expert)
            for module in self.modules
            if expert in self._rows[module.name][layer]
        }
        parent = self._row_of_parent(name, expert)
        return self._decide(name, expert, candidates=candidates, parent=parent, policy=policy)

    def _row_of(self, module: Module, name: str, layer: int, expert: int) -> Tensor:
        row = self._rows[module.name][layer][expert]
        return _read(module.checkpoint, name, row, experts=expert)

    def _row_of_parent(self, name: str, expert: int) -> Tensor | None:
        return None if self.parent is None else _read(self.parent, name, expert, experts=expert)

    def _shared(self, name: str, start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        candidates = {m.name: _read(m.checkpoint, name, part) for m in self.modules}
        parent = None if self.parent is None else _read(self.parent, name, part)
        policy = self.policies.shared
        return self._decide(name, None, candidates=candidates, parent=parent, policy=policy)

    def _decide(
        self, name: str, expert: int | None, *, candidates: dict[str, Tensor], parent: Tensor | None, policy: str
    ) -> Tensor:
        changed = _changed(candidates, parent)
        disagree = _disagree(changed)
        if policy == OWNER:
            policy = self.policies.conflict if disagree else next(iter(changed), PARENT)
        taken = value_of(policy, candidates=changed, parent=parent)
        value = taken.value
        if parent is not None:
            value = blended(value, parent=parent, share=self.policies.blend)
        where: dict[str, Any] = {"weight": name} | ({} if expert is None else {"expert": expert})
        where |= {"modules": list(changed), "taken": taken.source}
        if disagree:
            # two halves of a narrow range may be further apart than it is wide
            spread = max(float((c.float() - value.float()).abs().max()) for c in changed.values())
            self.report.conflicts.append(where | {"max_difference": spread})
        elif changed and taken.source == PARENT:
            self.report.left_out.append(where)
        if parent is not None and not torch.equal(value, parent):
            kind = split_name(name)[1]
            self.report.changed[kind] = self.report.changed.get(kind, 0) + 1
        return value

    def _check(self) -> None:
        policies, names = self.policies, [m.name for m in self.modules]
        if not 0.0 < policies.blend <= 1.0:
            raise ValueError(f"--blend must lie in (0, 1]; got {policies.blend}")
        if self.parent is None:
            self._check_parentless()
        for option in ("shared", "router", "conflict"):
            value = getattr(policies, option)
            special = {"shared": [], "router": [OWNER], "conflict": [REFUSE]}[option]
            known = [PARENT, "average", *special, *names]
            if value not in known:
                raise ValueError(f"--{option} must be one of {', '.join(known)}; got {value!r}")
        for module in self.modules:
            check_fits(
                module, self.model, num_experts=self.num_parent_experts, fingerprint=self.modules[0].selection.model
            )
        if len(self.modules) > 1:
            self._check_conflicts()

    def _check_parentless(self) -> None:
        used = {self.policies.shared, self.policies.router, self.policies.conflict}
        if PARENT in used or self.policies.blend != 1.0:
            raise ValueError("a policy takes values of the parent: give --parent, or another policy")
        for layer, experts in self._experts.items():
            orphans = [e for e in experts if not any(e in rows[layer] for rows in self._rows.values())]
            if orphans:
                raise ValueError(f"no module has expert {orphans[0]} of layer {layer}: give --parent, which has all")
            named = self._rows.get(self.policies.router)
            lacking = [] if named is None else [e for e in experts if e not in named[layer]]
            if lacking:
                raise ValueError(
                    f"--router {self.policies.router} does not have expert {lacking[0]} of layer {layer}: give "
                    "--parent, which has all, or another policy"
                )

    def _check_conflicts(self) -> None:
        """Look at the experts that several modules have, before anything is written."""
        conflict = self.policies.conflict
        if conflict in (PARENT, AVERAGE) or (conflict != REFUSE and self.parent is not None):
            return
        for name in filter(is_of_experts, self.model.names):
            layer, rest = split_name(name)
            if rest.startswith(ROUTER) and self.policies.router != OWNER:
                continue
            for expert in self._experts[layer]:
                owners = [m for m in self.modules if expert in self._rows[m.name][layer]]
                values = {m.name: self._row_of(m, name, layer, expert) for m in owners}
                if len(owners) < 2:
                    continue
                parent = self._row_of_parent(name, expert)
                changed = _changed(values, parent)
                if conflict in changed or not _disagree(changed):
                    continue
                said = f"{' and '.join(changed)} changed expert {expert} of layer {layer} ({name}) differently"
                if conflict == REFUSE:
                    raise ValueError(
                        f"{said}: say with --conflict whose to take (parent, average or a module's name); the report "
                        "lists every one"
                    )
                raise ValueError(
                    f"{said}, and --conflict {conflict} does not have it: give --parent, or another policy"
                )


def _read(
    checkpoint: MegatronCheckpoint, name: str, index: int | slice | Sequence[int], *, experts: int | Sequence[int] = ()
) -> Tensor:
    """A part of a weight. `experts`: the parent's numbers of those that it is of.

    Raises:
        NotFiniteError: it is not finite; nothing could be said of what a module changed.
    """
    part = checkpoint.read(name, index)
    layer = split_name(name)[0] or None
    check_weight(f"{name} of {checkpoint.path}", part, layer=layer, experts=experts)
    return part


def _changed(values: Mapping[str, Tensor], parent: Tensor | None) -> dict[str, Tensor]:
    """The values that are not the parent's; all of them where there is no parent to compare with."""
    return {module: value for module, value in values.items() if parent is None or not torch.equal(value, parent)}


def _disagree(values: Mapping[str, Tensor]) -> bool:
    first = next(iter(values.values()), None)
    return first is not None and not all(torch.equal(first, value) for value in values.values())
