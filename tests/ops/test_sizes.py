"""Pool sizes: the hash is a fixed function of its counters, uniform, and independent of layout."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.ops import draw_pool_sizes, top_p_pool_sizes


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


def test_sizes_equal_the_hash_in_unbounded_integers():
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15
    positions, offsets = [0, 1, 7, 10**12], [0, 255, 17, 4000]
    want = []
    for position, offset in zip(positions, offsets, strict=True):
        state = 3 * 4 + 1
        for counter in (position, offset, 5):
            state = _splitmix((state + gamma + counter) & mask)
        want.append(4 + ((state >> 33) * 29 >> 31))
    assert _draw(positions, offsets, layer_number=5, seed=3).tolist() == want


def test_sizes_are_uniform_over_both_bounds():
    sizes = _draw(torch.arange(58_000))
    counts = torch.bincount(sizes, minlength=33)[4:]
    assert sizes.min() == 4
    assert sizes.max() == 32
    # 2000 expected in each of 29 buckets; five standard deviations
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize("change", [{"layer_number": 2}, {"seed": 2}])
def test_layers_and_seeds_draw_apart(change):
    positions = torch.arange(4000)
    same = (_draw(positions) == _draw(positions, **change)).float().mean()
    assert same == pytest.approx(1 / 29, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_several_layers_at_once_draw_what_each_draws(share):
    positions, offsets = torch.arange(40) // 4 + 10**12, torch.arange(40) % 4 * 100
    layers = torch.tensor([1, 2, 48])
    options = {"unrestricted_share": share, "high": 30}
    got = _draw(positions, offsets, layer_number=layers[:, None], **options)
    want = [_draw(positions, offsets, layer_number=int(layer), **options) for layer in layers]
    assert torch.equal(got, torch.stack(want))


def test_documents_of_a_sample_draw_apart():
    positions = torch.zeros(4000, dtype=torch.int64)
    sizes = _draw(positions, torch.arange(4000))
    assert sizes.float().mean() == pytest.approx(18, abs=0.6)


def test_a_share_of_documents_is_unrestricted():
    positions = torch.arange(20_000)
    restricted, mixed = _draw(positions, high=8), _draw(positions, high=8, unrestricted_share=0.25)
    is_free = mixed == 32
    assert is_free.float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(mixed[~is_free], restricted[~is_free])
    assert (_draw(positions, unrestricted_share=1.0) == 32).all()


def test_the_extremes_of_the_seed_are_legal():
    for seed in (0, 2**62, 2**63 - 1):
        sizes = _draw(torch.arange(100), seed=seed)
        assert sizes.min() >= 4
        assert sizes.max() <= 32


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
