"""Compose modules of one parent: which experts the composition keeps, and whose value a weight gets.

Shapes: L MoE layers, E routed experts of the parent. Mixing several domains' scores follows EASY-EP (arXiv 2504.06792):
each layer's scores of a domain are divided by their sum, then added over domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emo_megatron.experts.select import select_top
from emo_megatron.experts.selection import Selection

Rule = Literal["union", "score"]

PARENT, AVERAGE, OWNER, REFUSE = "parent", "average", "owner", "refuse"
"""Policies for a weight's value, beside the name of a module."""
POLICIES = (PARENT, AVERAGE, OWNER, REFUSE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A weight's value and whose it is."""

    value: Tensor
    source: str
    """A module's name, "average" or "parent"."""


def compose_selections(
    selections: Sequence[Selection], *, keep: int | None = None, scores: Sequence[Tensor] = (), rule: Rule = "union"
) -> Selection:
    """The experts that several modules of one parent need together.

    Args:
        selections: of the same parent.
        keep: routed experts kept in every layer; None: as many as the largest union of a layer.
        scores: [L, E] for each selection in its order, higher is better. They decide which experts of a union that is
            too large stay, and which fill one that is too small.
        rule: "union" prefers experts of the selections; "score" looks at the added scores of all experts alone.

    Raises:
        ValueError: other parents, a `keep` that cannot be, scores that are missing or of another shape.
    """
    first = _check_parents(selections)
    union_LE = torch.stack([s.keep_mask() for s in selections]).any(dim=0)
    sizes_L = union_LE.sum(dim=1)
    if keep is None:
        if rule == "score":
            raise ValueError("--rule score needs --keep: scores alone set no number of experts")
        keep = int(sizes_L.max())
    if not 1 <= keep <= first.num_experts:
        raise ValueError(f"--keep must lie in [1, {first.num_experts}], the parent's routed experts; got {keep}")
    total_LE = torch.zeros(union_LE.shape, dtype=torch.float64)
    if scores:
        total_LE = _added(scores, selections=selections)
    elif rule == "score" or bool((sizes_L != keep).any()):
        low, high = int(sizes_L.min()), int(sizes_L.max())
        raise ValueError(
            f"the union keeps {low} to {high} experts a layer, and {keep} are asked for: give --stats, one file for "
            "each selection, so that scores decide which to keep"
        )
    if rule == "union":
        # more than all added scores together: an expert of a selection comes before any other
        total_LE = total_LE + union_LE * (len(selections) + 1.0)
    return Selection.from_mask(
        select_top(total_LE, keep=keep),
        layers=first.layers,
        method=f"compose_{rule}",
        seed=None,
        model=first.model,
        data={
            "of": [{"method": s.method, "seed": s.seed, "kept": list(s.num_kept), "data": s.data} for s in selections],
            "union": sizes_L.tolist(),
        },
    )


def value_of(policy: str, *, candidates: Mapping[str, Tensor], parent: Tensor | None) -> Taken:
    """A weight's value under a policy.

    Args:
        policy: "parent"; "average", the mean of the candidates; or a module's name.
        candidates: the values of the modules that have the weight and changed it, by module.
        parent: the parent's value, which stands where the policy names no candidate.

    Returns:
        In the candidates' dtype; means are formed in float32.

    Raises:
        ValueError: the policy names no candidate, and there is no parent.
    """
    if policy in candidates:
        return Taken(value=candidates[policy], source=policy)
    if policy == AVERAGE and candidates:
        values = list(candidates.values())
        mean = torch.stack([v.float() for v in values]).mean(dim=0).to(values[0].dtype)
        return Taken(value=mean, source=AVERAGE)
    if parent is None:
        raise ValueError(f"{policy} does not have this weight, and there is no parent to ask")
    return Taken(value=parent, source=PARENT)


def blended(value: Tensor, *, parent: Tensor, share: float) -> Tensor:
    """`share` of the way from the parent's value to `value`, formed in float32; 1 gives `value` itself."""
    if share == 1.0:
        return value
    return torch.lerp(parent.float(), value.float(), share).to(value.dtype)


def _check_parents(selections: Sequence[Selection]) -> Selection:
    if not selections:
        raise ValueError("nothing to compose: give at least one selection")
    first = selections[0]
    for number, other in enumerate(selections[1:], start=2):
        try:
            first.check_model(other.model, num_experts=other.num_experts, layers=other.layers)
        except ValueError as error:
            raise ValueError(f"selections 1 and {number} are of different parents: {error}") from None
    return first


def _added(scores: Sequence[Tensor], *, selections: Sequence[Selection]) -> Tensor:
    if len(scores) != len(selections):
        raise ValueError(f"--stats must name one file for each selection: {len(scores)} for {len(selections)}")
    shape = (len(selections[0].layers), selections[0].num_experts)
    for score_LE in scores:
        if tuple(score_LE.shape) != shape:
            raise ValueError(f"scores must be [layers, experts] = {shape}; got {tuple(score_LE.shape)}")
    parts = [s.double() / s.double().sum(dim=1, keepdim=True).clamp(min=1e-300) for s in scores]
    return torch.stack(parts).sum(dim=0)
