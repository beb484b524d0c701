"""Choose experts: a mask of the experts each layer keeps.

Shapes: L layers with experts, E routed experts. Source: arXiv 2605.06663, section 5 (mean router probability over a
task's calibration documents).
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_kept(keep_fraction: float, *, num_experts: int) -> int:
    """Routed experts in a fraction of all of them, at least one."""
    if not 0.0 < keep_fraction <= 1.0:
        raise ValueError(f"the fraction of experts kept must lie in (0, 1]; got {keep_fraction}")
    return max(1, round(keep_fraction * num_experts))


def select_top(scores_LE: Tensor, *, keep: int) -> Tensor:
    """Keep each layer's best-scored experts.

    Args:
        scores_LE: [L, E], higher is better; for the paper's method the mean router probability.
        keep: experts kept a layer, in [1, E].

    Returns:
        [L, E] bool with `keep` True a row; ties go to the lower index.
    """
    order_LE = scores_LE.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_LE, dtype=torch.bool).scatter_(1, order_LE[:, :keep], True)


def select_random(*, num_layers: int, num_experts: int, keep: int, seed: int) -> Tensor:
    """Keep `keep` experts a layer at random, [L, E] bool; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return select_top(torch.rand(num_layers, num_experts, generator=generator), keep=keep)
