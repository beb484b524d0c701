"""Documents padded for context parallelism: what every rank holds, and what routers make of it.

Padding at the end of a short sample, which Megatron counts to its last document, has no vote in a pool.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK, make_scope
from emo_megatron.mcore.dataset import write_indexed_dataset
from emo_megatron.mcore.padding import (
    Packing,
    cut_by_document,
    longest_padded,
    padded_bounds,
    padding_multiple,
    partition_bounds,
)

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 24
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]
"""Context-parallel ranks, and tensor-parallel ones that cut the sequence."""


@st.composite
def packings(draw):
    """Boundaries of a few samples, with empty documents and documents of one token, and the samples' padding."""
    num_samples = draw(st.integers(1, 3))
    bounds = [0]
    for row in range(num_samples):
        edges = st.lists(st.integers(0, SAMPLE), max_size=8).map(sorted)
        bounds += [row * SAMPLE + edge for edge in [*draw(edges), SAMPLE]]
    padding = draw(st.none() | st.lists(st.integers(0, 6), min_size=num_samples, max_size=num_samples))
    return torch.tensor(bounds, dtype=torch.int32), num_samples, padding


def _packing(packed):
    bounds, num_samples, padding = packed
    return Packing(
        cu_seqlens=bounds,
        tokens_per_sample=SAMPLE,
        num_samples=num_samples,
        num_padding_B=None if padding is None else torch.tensor(padding),
    )


def _scope(packing, pool, *, cp=(0, 1), tp=(0, 1), bounds=None, num_tokens=None):
    CLOCK.consumed_samples = 0
    shard = tiny.shard(tp_rank=tp[0], tp_size=tp[1], cp_rank=cp[0], cp_size=cp[1])
    num_tokens = num_tokens or packing.num_samples * SAMPLE
    try:
        return make_scope(
            packing,
            hidden_shape=torch.Size([num_tokens // cp[1] // tp[1], 1, 8]),
            shard=shard,
            pool=pool,
            bounds=bounds,
            cut_bounds=bounds,
        )
    finally:
        CLOCK.consumed_samples = None


def _sizes(scope, pool):
    return scope.draw_sizes(pool, num_layers=5, low=3, high=32, num_experts=32).tolist()


def _by_depth(packed, depth, *, pool):
    """Ids of all tokens of a packing at a depth, written out; -1 where the token so far on is of another document."""
    bounds, num_samples, padding = packed
    is_padding = [False] * (num_samples * SAMPLE)
    for row, count in enumerate(padding or ()):
        for place in range((row + 1) * SAMPLE - count, (row + 1) * SAMPLE):
            is_padding[place] = True
    ids = [-1] * len(is_padding)
    for document, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        for place in range(start, end):
            further = place + depth
            if not is_padding[place] and further < end and not is_padding[further]:
                ids[place] = place // SAMPLE if pool.pool_scope == "sample" else document
    return ids


@settings(max_examples=40, deadline=None)
@given(
    packed=packings(),
    layout=st.sampled_from(LAYOUTS),
    options=st.sampled_from([{}, {"pool_scope": "sample"}, {"pool_eos_starts_document": True}]),
    tail=st.sampled_from([None, 40]),
)
def test_ranks_see_the_documents_and_sizes_of_one_process(packed, layout, options, tail):
    cp_size, tp_size = layout
    packing, pool = _packing(packed), PoolConfig(pool_min=3, **options)
    multiple = padding_multiple(cp_size=cp_size, tp_size=tp_size)
    num_tokens = tail and longest_padded(packing.num_samples * SAMPLE, max_documents=tail, multiple=multiple)
    bounds = padded_bounds(packing.cu_seqlens, multiple=multiple, num_tokens=num_tokens)
    assert (bounds.diff() % multiple == 0).all()
    alone = _scope(packing, pool)
    seen: dict[int, dict[int, int]] = {0: {}, 1: {}, 3: {}}
    for cp_rank, tp_rank in itertools.product(range(cp_size), range(tp_size)):
        part = {"cp": (cp_rank, cp_size), "tp": (tp_rank, tp_size)}
        scope = _scope(packing, pool, **part, bounds=bounds, num_tokens=int(bounds[-1]))
        assert _sizes(scope, pool) == _sizes(alone, pool)
        assert scope.sample_positions_D.tolist() == alone.sample_positions_D.tolist()
        for depth, found in seen.items():
            ids = scope.ids_at(depth).tolist()
            assert all(i == -1 for i, p in zip(ids, scope.places_T.tolist(), strict=True) if p < 0)
            pairs = zip(scope.places_T.tolist(), ids, strict=True)
            found |= {place: document for place, document in pairs if place >= 0}
    for depth, found in seen.items():
        assert sorted(found) == list(range(packing.num_samples * SAMPLE))
        assert [found[place] for place in sorted(found)] == alone.ids_at(depth).tolist()
    if "pool_eos_starts_document" not in options:
        for depth in seen:
            assert alone.ids_at(depth).tolist() == _by_depth(packed, depth, pool=pool)


@settings(max_examples=30, deadline=None)
@given(packed=packings(), layout=st.sampled_from(LAYOUTS))
def test_ranks_hold_every_token_once_and_zeros(packed, layout):
    bounds, num_samples, _ = packed
    cp_size, tp_size = layout
    padded = padded_bounds(bounds, multiple=padding_multiple(cp_size=cp_size, tp_size=tp_size))
    tokens = torch.arange(1, num_samples * SAMPLE + 1)[None]
    held = []
    for rank in range(cp_size):
        cut = cut_by_document(
            {"tokens": tokens, "labels": None, "other": 1},
            ("tokens", "labels"),
            cu_seqlens=bounds,
            bounds=padded,
            num_tokens=int(padded[-1]),
            cp_rank=rank,
            cp_size=cp_size,
        )
        assert (cut["labels"], cut["other"]) == (None, 1)
        assert cut["tokens"].shape == (1, int(padded[-1]) // cp_size)
        held += cut["tokens"][0].tolist()
    assert sorted(token for token in held if token) == tokens[0].tolist()


def test_in_routers_mode_ids_stay_at_every_depth():
    packing = _packing((torch.tensor([0, 3, SAMPLE]), 1, None))
    scope = _scope(packing, PoolConfig(pool_min=3, pool_documents="routers"))
    assert scope.ids_at(2) is scope.document_ids_T


def test_boundaries_that_do_not_fit_are_an_error():
    packing = _packing((torch.tensor([0, 5, SAMPLE]), 1, None))
    pool = PoolConfig(pool_min=3)
    for wrong in ([0, 4, 28], [0, 8], [0, 8, 32]):
        with pytest.raises(ValueError, match="cu_seqlens_q"):
            _scope(packing, pool, cp=(0, 2), bounds=torch.tensor(wrong), num_tokens=28)
    packing.num_samples = None
    with pytest.raises(ValueError, match="num_samples"):
        _scope(packing, pool, cp=(0, 2), bounds=torch.tensor([0, 8, 28]), num_tokens=28)


def test_a_host_that_says_how_it_cut_decides():
    packed = tiny.packed([0, 8, 16])
    assert partition_bounds(packed, "sample") is None
    packed.cp_partition_mode = "zigzag"
    assert partition_bounds(packed, "sample") is packed.cu_seqlens_q
    packed.cp_partition_mode = "contiguous"
    with pytest.raises(ValueError, match="--cp-partition-mode"):
        partition_bounds(packed, "document")


def waste_rows():
    """Share of padding by mean length of a document and layout, as docs/parallelism.md shows it."""
    layouts = [(2, 1), (4, 1), (8, 1), (16, 1), (8, 8)]
    for mean in (100, 500, 2000, 10000):
        # every length from 1 to twice the mean once
        bounds = torch.arange(2 * mean).cumsum(0)
        shares = []
        for cp_size, tp_size in layouts:
            multiple = padding_multiple(cp_size=cp_size, tp_size=tp_size)
            padded = padded_bounds(bounds, multiple=multiple)
            shares.append(f"{1 - float(bounds[-1] / padded[-1]):.1%}")
        yield f"| {mean} | {' | '.join(shares)} |"


def test_the_page_shows_the_waste():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    for row in waste_rows():
        assert row in page


def test_samples_tell_their_padding(ranks, tmp_path):
    # 60 tokens of documents of 12 ends in a sample of 24 and one that is short
    documents = [[value] * 12 for value in (5, 6, 7, 8, 9)]
    write_indexed_dataset(tmp_path / "text", documents, vocab_size=512)
    *samples, nothing = ranks(1).run(tiny.validation_samples, prefix=tmp_path / "text", cache=tmp_path / "cache")[0]
    padding = [sample["num_padding"] for sample in samples]
    assert nothing["num_padding"] == SAMPLE
    assert sorted(padding)[:-1] == [0] * (len(padding) - 1)
    short = samples[padding.index(max(padding))]
    assert 0 < max(padding) < SAMPLE
    real = SAMPLE - max(padding)
    assert (short["tokens"][:real] >= 5).all()
    assert not short["tokens"][real:].any()
    assert short["cu_seqlens"][-1] == SAMPLE, "Megatron counts padding to a document; if not, this can go"


def _votes(padding):
    """Pools of two samples whose last tokens are padding or text, at logits that tell both apart."""
    tiny.setup()
    pool = PoolConfig(pool_min=3, pool_max=3)
    router = tiny.router(pool)
    router.scope = tiny.scope(tiny.packed([0, 6, 16, 32], num_padding=padding), pool)
    logits = torch.zeros(32, 1, 8)
    logits[:, :, :3] = 1.0
    # the tail of the first sample wants the last experts, more than the rest wants the first
    logits[9:16] = 0.0
    logits[9:16, :, 5:] = 9.0
    probs, _ = router.routing(logits)
    pools = router.scope.pools[1]
    return [row.nonzero().flatten().tolist() for row in pools], probs.abs().sum(1).gt(0).tolist()


def test_padding_leaves_the_last_documents_vote(ranks):
    first, last = [0, 1, 2], [5, 6, 7]
    pools, weighted = ranks(1).run(_votes, padding=None)[0]
    assert pools == [first, last, first]
    assert all(weighted)
    pools, weighted = ranks(1).run(_votes, padding=[7, 0])[0]
    assert pools == [first, first, first]
    assert weighted == [True] * 9 + [False] * 7 + [True] * 16
