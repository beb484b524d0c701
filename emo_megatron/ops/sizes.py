"""How large each document's pool is: a counter-based hash instead of a generator, so every layout draws the same.

A size depends on (seed, sample position in training, start of the document in its sample, layer) and on nothing that
differs between ranks, pipeline stages or a resumed run. All integer arithmetic on the device, no host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def draw_pool_sizes(
    sample_positions_D: Tensor,
    *,
    offsets_D: Tensor,
    layer_number: int | Tensor,
    seed: int,
    low: int,
    high: int,
    unrestricted_share: float = 0.0,
    num_experts: int,
) -> Tensor:
    """Draw each document's pool size uniformly from the integers in [low, high].

    Args:
        sample_positions_D: [D] int64, global index of the training sample that holds the document.
        offsets_D: [D] int64, first token of the document within its sample.
        layer_number: 1-based global layer number; [L, 1] int64 draws for several layers at once.
        seed: of the draw.
        low, high: bounds, inclusive.
        unrestricted_share: fraction of documents that get all `num_experts` instead.
        num_experts: E.

    Returns:
        [D] int64 sizes, [L, D] for several layers.
    """
    bits_D = _hash(sample_positions_D, offsets_D, layer_number, seed, stream=0)
    sizes_D = low + _scale(bits_D, high - low + 1)
    if unrestricted_share > 0.0:
        coin_D = _hash(sample_positions_D, offsets_D, layer_number, seed, stream=1)
        is_free_D = _scale(coin_D, 1 << 24) < round(unrestricted_share * (1 << 24))
        sizes_D = torch.where(is_free_D, num_experts, sizes_D)
    return sizes_D


def top_p_pool_sizes(scores_DE: Tensor, *, top_p: float, low: int, high: int) -> Tensor:
    """The fewest experts that hold `top_p` of each document's probability, within [low, high].

    Args:
        scores_DE: [D, E] int64 document scores, fully reduced.
        top_p: probability mass in (0, 1).
        low, high: bounds, inclusive.

    Returns:
        [D] int64 sizes.
    """
    mass_DE = scores_DE.sort(dim=-1, descending=True).values.to(torch.float64).cumsum(dim=-1)
    is_short_DE = mass_DE < top_p * mass_DE[:, -1:]
    return (is_short_DE.sum(dim=-1) + 1).clamp(min=low, max=high)


def _hash(
    position_D: Tensor, offset_D: Tensor, layer_number: int | Tensor, seed: int, *, stream: int
) -> Tensor:
    """Chain splitmix64's finaliser over the counters; int64 multiplication wraps on every device."""
    state_D = torch.full_like(position_D, _wrap(seed * 4 + stream + 1))
    for counter in (position_D, offset_D, layer_number):
        state_D = _mix(state_D + _GOLDEN_GAMMA + counter)
    return state_D


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift right filling with zeros; torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scale(bits: Tensor, buckets: int) -> Tensor:
    """Map the top 31 bits onto [0, buckets) with a multiply; the bias is below buckets / 2**31."""
    return (_logical_shift(bits, 33) * buckets) >> 31


def _wrap(value: int) -> int:
    """A Python integer as the int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
