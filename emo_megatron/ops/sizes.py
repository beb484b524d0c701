"""How large each document's pool is: a counter-based hash instead of a generator, so every layout draws the same.

A size depends on (seed, sample position in training, start of the document in its sample, layer) and on nothing that
differs between ranks, pipeline stages or a resumed run. All integer arithmetic on the device, no host sync, but for
the table of a skewed draw, which is sent there when its bounds are new.
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
        offsets_D: [D] int64, first token of the document within its sample.
        layer_number: 1-based global layer number; a range of them, or [L, 1] int64, draws for several layers at once.
        seed: of the draw.
        low, high: bounds, inclusive.
        skew: a, finite and above 0: the size is low + floor((high - low + 1) * u^(1 / a)) with u uniform in [0, 1).
        unrestricted_share: fraction of documents that get all `num_experts` instead.
        num_experts: E.
        draw: a backend's `draw_bits`; the one below by default.

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
    """Random bits for every layer and document: splitmix64's finaliser, chained over the counters.

    Args:
        sample_positions_D, offsets_D, seed: as in `draw_pool_sizes`.
        layers: L layer numbers, in steps of one; or [L] int64 of any.
        stream: 0 to 3, draws of the same seed that are independent.

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
    """The hash before the first counter: the low 64 bits of a Python integer, as an int64."""
    value = (seed * 4 + stream + 1) & ((1 << 64) - 1)
    return value - (1 << 64) if value >= 1 << 63 else value


def top_p_pool_sizes(scores_DE: Tensor, *, top_p: float, low: int, high: int) -> Tensor:
    """The fewest experts that hold `top_p` of each document's probability, within [low, high].

    Args:
        scores_DE: [D, E] int64 document scores, fully reduced.
        top_p: probability mass in (0, 1).
        low, high: bounds, inclusive.

    Returns:
        [D] int64 sizes.
    """
    # summed up as integers: exact, and deterministic on a GPU, where a cumsum of floats is not
    mass_DE = scores_DE.sort(dim=-1, descending=True).values.cumsum(dim=-1).to(torch.float64)
    is_short_DE = mass_DE < top_p * mass_DE[:, -1:]
    return (is_short_DE.sum(dim=-1) + 1).clamp(min=low, max=high)


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


def _skewed(bits: Tensor, buckets: int, skew: float) -> Tensor:
    """Map the top 31 bits, u * 2^31, onto [0, buckets) as floor(buckets * u^(1 / skew)): count the thresholds reached.

    No power on the device, whose last bits would make a GPU draw another size than a CPU.
    """
    # a tensor made in tracing is not to be kept
    is_traced = torch.compiler.is_compiling() or type(bits) is not Tensor
    table = _device_table.__wrapped__ if is_traced else _device_table
    thresholds_K = table(buckets, skew, bits.device)
    return torch.searchsorted(thresholds_K, _logical_shift(bits, 33), right=True)


@functools.lru_cache(maxsize=8)
def _device_table(buckets: int, skew: float, device: torch.device) -> Tensor:
    # made on the CPU by name, or a default device would make it one that no FakeTensorMode knows
    return torch.tensor(_thresholds(buckets, skew), dtype=torch.int64, device="cpu").to(device)


# torch.compile can't trace decimals
@torch.compiler.assume_constant_result
def _thresholds(buckets: int, skew: float) -> list[int]:
    """For k = 1 to buckets - 1 the least 31-bit number in bucket k or above: ceil(2^31 * (k / buckets)^skew).

    In decimals, for the C library's powers differ between machines, and a run may go on on another.
    """
    with localcontext(Context(prec=50)):
        shares = [(Decimal(k) / buckets) ** Decimal(skew) for k in range(1, buckets)]
        return [math.ceil(2**31 * share) for share in shares]
