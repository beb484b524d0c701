"""Pool sizes: the hash is a fixed function of its counters, uniform, and independent of layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emo_megatron.ops import draw_bits, draw_pool_sizes, sizes, top_p_pool_sizes


def _draw(positions, offsets=None, **overrides):
    positions = torch.as_tensor(positions)
    offsets = torch.zeros_like(positions) if offsets is None else torch.as_tensor(offsets)
    options = {"layer_number": 1, "seed": 1, "low": 4, "high": 32, "num_experts": 32} | overrides
    return draw_pool_sizes(positions, offsets_D=offsets, **options)


def _splitmix(state: int) -> int:
    """The published finaliser in unbounded integers, masked to 64 bits."""
    mask = (1 << 64) - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 3, 2**62, 2**63 - 1])
def test_sizes_equal_the_hash_in_unbounded_integers(seed):
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15
    positions, offsets = [0, 1, 7, 10**12], [0, 255, 17, 4000]
    want = []
    for position, offset in zip(positions, offsets, strict=True):
        state = (seed * 4 + 1) & mask
        for counter in (position, offset, 5):
            state = _splitmix((state + gamma + counter) & mask)
        want.append(4 + ((state >> 33) * 29 >> 31))
    assert _draw(positions, offsets, layer_number=5, seed=seed).tolist() == want


def test_sizes_are_uniform_over_both_bounds():
    sizes = _draw(torch.arange(58_000))
    counts = torch.bincount(sizes, minlength=33)[4:]
    assert sizes.min() == 4
    assert sizes.max() == 32
    # 2000 expected in each of 29 buckets; five standard deviations
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize("skew", [1.0, 2.5])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_several_layers_at_once_draw_what_each_draws(share, skew):
    positions, offsets = torch.arange(40) // 4 + 10**12, torch.arange(40) % 4 * 100
    layers = torch.tensor([1, 2, 48])
    options = {"unrestricted_share": share, "high": 30, "skew": skew}
    got = _draw(positions, offsets, layer_number=layers[:, None], **options)
    want = [_draw(positions, offsets, layer_number=int(layer), **options) for layer in layers]
    assert torch.equal(got, torch.stack(want))


def test_a_share_of_documents_is_unrestricted():
    positions = torch.arange(20_000)
    restricted, mixed = _draw(positions, high=8), _draw(positions, high=8, unrestricted_share=0.25)
    is_free = mixed == 32
    assert is_free.float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(mixed[~is_free], restricted[~is_free])
    assert (_draw(positions, unrestricted_share=1.0) == 32).all()


@pytest.mark.parametrize("skew", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("high", [32, 511])
def test_skewed_sizes_are_the_formula_in_unbounded_integers(skew, high):
    positions = torch.arange(3000)
    bits = draw_bits(positions, positions, layers=range(5, 6), seed=3)[0]
    n, want = high - 4 + 1, []
    for u in ((bits >> 33) & (2**31 - 1)).tolist():
        if skew == 0.5:
            want.append(4 + (n * u * u >> 62))
        elif skew == 2.0:
            want.append(4 + math.isqrt(n**2 * u >> 31))
        else:
            want.append(4 + math.isqrt(math.isqrt(n**4 * u >> 31)))
    options = {"layer_number": 5, "seed": 3, "high": high, "skew": skew, "num_experts": 512}
    assert _draw(positions, positions, **options).tolist() == want


def test_skewed_sizes_have_the_shares_of_the_formula():
    drawn = _draw(torch.arange(58_000), skew=2.5)
    counts = torch.bincount(drawn, minlength=33)[4:].double()
    edges = (torch.arange(30, dtype=torch.float64) / 29) ** 2.5
    wanted = edges.diff() * 58_000
    assert ((counts - wanted).abs() < 5 * wanted.sqrt() + 1).all()


@pytest.mark.parametrize("buckets", [1, 2, 29, 505, 512])
def test_the_table_of_skew_1_is_the_uniform_draw(buckets):
    first = torch.tensor([(k << 31) // buckets for k in range(buckets)])
    near = (first[:, None] + torch.arange(-2, 3)).flatten().clamp(0, 2**31 - 1)
    spread = torch.randint(2**31, (100_000,))
    bits = torch.cat([near, spread]) << 33
    assert torch.equal(sizes._skewed(bits, buckets, 1.0), sizes._scale(bits, buckets))


def test_more_skew_gives_larger_sizes_up_to_the_bounds():
    positions = torch.arange(2000)
    drawn = [_draw(positions, skew=skew) for skew in (1e-300, 0.5, 1.0, 1.5, 2.0, 4.0, 1e300)]
    for smaller, larger in itertools.pairwise(drawn):
        assert (smaller <= larger).all()
        assert (smaller < larger).any()
    assert (drawn[0] == 4).all()
    assert (drawn[-1] == 32).all()
    assert (_draw(positions, low=7, high=7, skew=2.0) == 7).all()


def test_tracing_keeps_nothing_that_a_draw_would_find():
    def draw(positions):
        return _draw(positions, skew=1.75, layer_number=range(1, 4))

    with FakeTensorMode():
        assert draw(torch.arange(9)).shape == (3, 9)
    positions = torch.arange(9)
    assert torch.equal(torch.compile(draw, fullgraph=True, backend="eager")(positions), draw(positions))


def test_top_p_takes_the_fewest_experts_that_hold_the_mass():
    scores = torch.tensor([[50, 30, 15, 5], [25, 25, 25, 25], [100, 0, 0, 0]])
    assert top_p_pool_sizes(scores, top_p=0.8, low=1, high=4).tolist() == [2, 4, 1]
    assert top_p_pool_sizes(scores, top_p=0.8, low=2, high=3).tolist() == [2, 3, 2]


def test_top_p_sums_up_integers():
    # beyond 2**53 a sum of float64 numbers loses the ones
    scores = torch.tensor([[2**53, 1, 1, 0]])
    assert top_p_pool_sizes(scores, top_p=1.0, low=1, high=4).tolist() == [3]
    few = torch.randint(0, 2**30, (50, 40), generator=torch.Generator().manual_seed(0))
    mass = few.double().sort(dim=-1, descending=True).values.cumsum(-1)
    want = ((mass < 0.7 * mass[:, -1:]).sum(-1) + 1).clamp(2, 30)
    assert torch.equal(top_p_pool_sizes(few, top_p=0.7, low=2, high=30), want)
