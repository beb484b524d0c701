"""Which experts a composition of modules of one parent keeps.

Shapes: L MoE layers, E routed experts of the parent. Mixing several domains' scores follows EASY-EP (arXiv 2504.06792):
each layer's scores of a domain are divided by their sum, then added over domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from emo_megatron.experts.select import select_top
from emo_megatron.experts.selection import Selection

Rule = Literal["union", "score"]


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


def _check_parents(selections: Sequence[Selection]) -> Selection:
    if not selections:
        raise ValueError("--selections must name at least one Selection; got none")
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
    if wrong := [tuple(s.shape) for s in scores if s.shape != shape]:
        raise ValueError(f"scores must have the shape {shape} of layers and experts; got {wrong[0]}")
    parts = [s.double() / s.double().sum(dim=1, keepdim=True).clamp(min=1e-300) for s in scores]
    return torch.stack(parts).sum(dim=0)
