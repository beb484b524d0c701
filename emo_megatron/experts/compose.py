"""Choose the experts of a composition of modules of one parent.

Shapes: L MoE layers, E routed experts of the parent. Scores of several domains are combined as in EASY-EP (arXiv
2504.06792): the scores of one domain in one layer are divided by their sum, and the results are added over domains.
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
        keep: routed experts per layer; None: the size of the largest union of a layer.
        scores: [L, E] for each selection, in the order of the selections; higher is better. If the union of a layer is
            larger than `keep`, the scores choose among the union; if smaller, the scores choose additional experts.
        rule: "union" prefers experts of the selections; "score" uses only the added scores of all experts.
    """
    first = _check_parents(selections)
    union_LE = torch.stack([s.keep_mask() for s in selections]).any(dim=0)
    sizes_L = union_LE.sum(dim=1)
    if keep is None:
        if rule == "score":
            raise ValueError("--rule score needs --keep, because scores do not determine the number of experts")
        keep = int(sizes_L.max())
    if not 1 <= keep <= first.num_experts:
        raise ValueError(f"--keep must be in [1, {first.num_experts}], the parent's routed experts; got {keep}")
    total_LE = torch.zeros(union_LE.shape, dtype=torch.float64)
    if scores:
        total_LE = _added(scores, selections=selections)
    elif rule == "score" or bool((sizes_L != keep).any()):
        low, high = int(sizes_L.min()), int(sizes_L.max())
        raise ValueError(
            f"scores must choose the experts: the union has {low} to {high} experts per layer, and the result must "
            f"have {keep}; add --stats, one file per selection"
        )
    if rule == "union":
        # more than the sum of all scores: experts of the selections rank before all other experts
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
            raise ValueError(f"--selections 1 and {number} must have the same parent: {error}") from None
    return first


def _added(scores: Sequence[Tensor], *, selections: Sequence[Selection]) -> Tensor:
    if len(scores) != len(selections):
        raise ValueError(
            f"--stats must name one file per selection; got {len(scores)} files for {len(selections)} selections"
        )
    shape = (len(selections[0].layers), selections[0].num_experts)
    if wrong := [tuple(s.shape) for s in scores if s.shape != shape]:
        raise ValueError(f"scores must have the shape {shape} (layers, experts); got {wrong[0]}")
    parts = [s.double() / s.double().sum(dim=1, keepdim=True).clamp(min=1e-300) for s in scores]
    return torch.stack(parts).sum(dim=0)
