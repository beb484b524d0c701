"""Choose experts by running the model: layer by layer, and the smallest module within a bound.

Shapes: L layers with experts, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.select import MaxLossIncrease
from emo_megatron.runners.cache import CachedRunner


def select_layerwise(model: CachedRunner, documents: Documents, *, keep: int) -> Tensor:
    """Keep each layer's most probable experts, measured after the earlier layers are reduced to their kept experts.

    Needs one pass over the documents per layer, as in the authors' code. Returns [L, E] bool, `keep` True per row.
    """
    metadata = model.metadata
    allowed_LE = torch.ones(len(metadata.layers), metadata.num_experts, dtype=torch.bool)
    bar = tqdm(allowed_LE, desc="layer by layer", unit="layer", disable=None if model.is_writer else True)
    for place, allowed_E in enumerate(bar):
        kept = model.kept_experts(documents, allowed_LE=allowed_LE, place=place, keep=keep)
        allowed_E[:] = False
        allowed_E[kept] = True
    return allowed_LE


def smallest_within(
    model: CachedRunner, validation: Documents, *, choose: Callable[[int], Tensor], bound: MaxLossIncrease
) -> tuple[Tensor, dict[int, float]]:
    """Find the smallest number of experts per layer whose loss is within a bound, by bisection.

    Bisection assumes that the loss increases when experts are removed. If this is not true, the result is still within
    the bound, and one expert fewer is not; but a smaller module within the bound may exist.

    Args:
        model: the runner of the model.
        validation: validation documents, which must differ from the documents that choose the experts.
        choose: routed experts kept per layer -> [L, E] bool.
        bound: largest loss increase allowed.

    Returns:
        [L, E] bool; and the sizes tried: routed experts kept per layer -> loss in nats per token, ascending, the full
        model last.
    """
    metadata = model.metadata
    full = model.loss(validation).nats
    tried = {metadata.num_experts: full}
    masks = {metadata.num_experts: torch.ones(len(metadata.layers), metadata.num_experts, dtype=torch.bool)}
    # `low` is below top-k or exceeds the bound; `high` is within the bound
    low, high = metadata.top_k - 1, metadata.num_experts
    with tqdm(
        total=(high - low - 1).bit_length(),
        desc="smallest module",
        unit="size",
        disable=None if model.is_writer else True,
    ) as bar:
        while high - low > 1:
            keep = (low + high) // 2
            masks[keep] = choose(keep)
            tried[keep] = model.loss(validation, allowed_LE=masks[keep]).nats
            if tried[keep] <= bound.highest(full):
                high = keep
            else:
                low = keep
            bar.update()
    return masks[high], dict(sorted(tried.items()))
