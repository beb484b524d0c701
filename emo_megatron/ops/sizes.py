"""Sizes of pools, drawn by a counter-based hash instead of a random generator: equal in all parallel layouts.

A size depends only on the seed, the sample's position in training, the document's start in its sample, and the layer.
These do not differ between ranks, pipeline stages or resumed runs. All arithmetic is on integers on the device, without
a host sync. One exception: a skewed draw with new bounds copies a table to the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

_GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def draw_pool_sizes(
    sample_positions_D: Tensor,
    *,
    offsets_D: Tensor,
    layer_number: int | range | Tensor,
    seed: int,
    low: int,
    high: int,
    skew: float = 1.0,
    unrestricted_share: float = 0.0,
    num_experts: int,
    draw: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Draw each document's pool size from the integers in [low, high], uniformly by default.

    Args:
        sample_positions_D: [D] int64, global index of the training sample that holds the document.
        offsets_D: [D] int64, index of the document's first token in its sample.
        layer_number: global layer number, from 1. A range, or an [L, 1] int64 tensor, draws for several layers at once.
        seed: seed of the draw.
        low, high: smallest and largest size, in experts, inclusive.
        skew: a, finite and above 0: the size is low + floor((high - low + 1) * u^(1 / a)) with u uniform in [0, 1).
        unrestricted_share: share of documents, in [0, 1], that get the size `num_experts` instead.
        num_experts: E.
        draw: a backend's `draw_bits`; None: `draw_bits` of this module.

    Returns:
        [D] int64 sizes, [L, D] for several layers.
    """
    if isinstance(layer_number, Tensor):
        layers: range | Tensor = layer_number.reshape(-1)
    elif isinstance(layer_number, range):
        layers = layer_number
    else:
        layers = range(layer_number, layer_number + 1)

    def bits(stream: int) -> Tensor:
        return (draw or draw_bits)(sample_positions_D, offsets_D, layers=layers, seed=seed, stream=stream)

    buckets = high - low + 1
    bits_LD = bits(0)
    sizes_LD = low + (_scale(bits_LD, buckets) if skew == 1.0 else _skewed(bits_LD, buckets, skew))
    if unrestricted_share > 0.0:
        is_free_LD = _scale(bits(1), 1 << 24) < round(unrestricted_share * (1 << 24))
        sizes_LD = torch.where(is_free_LD, num_experts, sizes_LD)
    return sizes_LD[0] if isinstance(layer_number, int) else sizes_LD


def draw_bits(
    sample_positions_D: Tensor, offsets_D: Tensor, *, layers: range | Tensor, seed: int, stream: int
) -> Tensor:
    """Random bits per layer and document: splitmix64's finaliser, chained over the counters.

    Args:
        sample_positions_D, offsets_D, seed: see `draw_pool_sizes`.
        layers: a range of L layer numbers with step 1; or any L layer numbers as [L] int64.
        stream: 0 to 3, number of an independent stream of draws with the same seed.

    Returns:
        [L, D] int64, all 64 bits random.
    """
    if isinstance(layers, range):
        layers_L = torch.arange(layers.start, layers.stop, device=sample_positions_D.device)
    else:
        layers_L = layers
    state_D = torch.full_like(sample_positions_D, first_state(seed, stream=stream))
    # int64 multiplication wraps on every device
    for counter_D in (sample_positions_D, offsets_D):
        state_D = _mix(state_D + _GOLDEN_GAMMA + counter_D)
    return _mix(state_D + _GOLDEN_GAMMA + layers_L[:, None])


def first_state(seed: int, *, stream: int) -> int:
    """State of the hash before the first counter: the low 64 bits of a Python integer, as an int64."""
    value = (seed * 4 + stream + 1) & ((1 << 64) - 1)
    return value - (1 << 64) if value >= 1 << 63 else value


def top_p_pool_sizes(scores_DE: Tensor, *, top_p: float, low: int, high: int) -> Tensor:
    """Smallest number of experts that hold `top_p` of each document's probability, limited to [low, high].

    Args:
        scores_DE: [D, E] int64 document scores, reduced over all ranks that hold a piece of the document.
        top_p: share of the probability, in (0, 1).
        low, high: smallest and largest size, in experts, inclusive.

    Returns:
        [D] int64 sizes.
    """
    # the cumsum is over integers: exact, and deterministic on a GPU, where a cumsum over floats is not
    mass_DE = scores_DE.sort(dim=-1, descending=True).values.cumsum(dim=-1).to(torch.float64)
    is_short_DE = mass_DE < top_p * mass_DE[:, -1:]
    return (is_short_DE.sum(dim=-1) + 1).clamp(min=low, max=high)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scale(bits: Tensor, buckets: int) -> Tensor:
    """Map the top 31 bits to [0, buckets) by a multiplication; the bias is below `buckets / 2**31`."""
    return (_logical_shift(bits, 33) * buckets) >> 31


def _skewed(bits: Tensor, buckets: int, skew: float) -> Tensor:
    """Map the top 31 bits, u * 2^31, to [0, buckets) as floor(buckets * u^(1 / skew)), by a table of thresholds.

    A power computed on the device would differ in its last bits, so a GPU could draw another size than a CPU.
    """
    # a tensor created during tracing must not be cached
    is_traced = torch.compiler.is_compiling() or type(bits) is not Tensor
    table = _device_table.__wrapped__ if is_traced else _device_table
    thresholds_K = table(buckets, skew, bits.device)
    return torch.searchsorted(thresholds_K, _logical_shift(bits, 33), right=True)


@functools.lru_cache(maxsize=8)
def _device_table(buckets: int, skew: float, device: torch.device) -> Tensor:
    # device="cpu" is explicit: with a default device, the tensor would be unknown to FakeTensorMode
    return torch.tensor(_thresholds(buckets, skew), dtype=torch.int64, device="cpu").to(device)


# torch.compile can't trace decimals
@torch.compiler.assume_constant_result
def _thresholds(buckets: int, skew: float) -> list[int]:
    """For k = 1 to buckets - 1, the smallest 31-bit number in bucket k or above: ceil(2^31 * (k / buckets)^skew).

    Computed in decimals: powers of the C library differ between machines, and a run may resume on another machine.
    """
    with localcontext(Context(prec=50)):
        shares = [(Decimal(k) / buckets) ** Decimal(skew) for k in range(1, buckets)]
        return [math.ceil(2**31 * share) for share in shares]
