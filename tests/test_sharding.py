"""Tests of emo_megatron.sharding: every token on one rank, in the order Megatron cuts hidden states."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_megatron.documents import DocumentSegments
from emo_megatron.sharding import local_token_indices

sizes = st.integers(1, 4)
examples = settings(deadline=None, max_examples=60)


@examples
@given(tp_size=sizes, cp_size=sizes, batch_size=sizes, chunk=st.integers(1, 3), data=st.data())
def test_shards_cover_every_token_once(
    tp_size: int, cp_size: int, batch_size: int, chunk: int, data: st.DataObject
) -> None:
    num_tokens = batch_size * chunk * 2 * cp_size * tp_size
    cuts = data.draw(st.lists(st.integers(0, num_tokens), max_size=6))
    cu = torch.tensor([0, *sorted(cuts), num_tokens])
    segments = DocumentSegments.from_cu_seqlens(cu, num_tokens=num_tokens)
    gathered = torch.full((num_tokens,), -2)
    seen = torch.zeros(num_tokens, dtype=torch.int64)
    for cp_rank in range(cp_size):
        for tp_rank in range(tp_size):
            indices = local_token_indices(
                num_tokens=num_tokens,
                batch_size=batch_size,
                tp_rank=tp_rank,
                tp_size=tp_size,
                cp_rank=cp_rank,
                cp_size=cp_size,
            )
            assert indices.shape == (num_tokens // (tp_size * cp_size),)
            assert indices.dtype == torch.int64
            gathered[indices] = segments.take(indices)
            seen[indices] += 1
    assert seen.tolist() == [1] * num_tokens
    assert gathered.tolist() == segments.document_ids_T.tolist()


@examples
@given(tp_size=sizes, cp_size=sizes, batch_size=sizes, chunk=st.integers(1, 3))
def test_shards_follow_the_tensors(tp_size: int, cp_size: int, batch_size: int, chunk: int) -> None:
    sequence = chunk * 2 * cp_size * tp_size
    # [s, b] holds the flat packed index of each token; cut it as Megatron cuts hidden states
    hidden_SB = torch.arange(batch_size * sequence).view(batch_size, sequence).t()
    for cp_rank in range(cp_size):
        chunks = hidden_SB.chunk(2 * cp_size) if cp_size > 1 else (hidden_SB, hidden_SB[:0])
        pair = (chunks[cp_rank], chunks[-1 - cp_rank])
        on_cp_rank = torch.cat(pair)
        for tp_rank in range(tp_size):
            want = on_cp_rank.chunk(tp_size)[tp_rank].reshape(-1)
            got = local_token_indices(
                num_tokens=batch_size * sequence,
                batch_size=batch_size,
                tp_rank=tp_rank,
                tp_size=tp_size,
                cp_rank=cp_rank,
                cp_size=cp_size,
            )
            assert got.tolist() == want.tolist()


@examples
@given(tp_size=sizes, cp_size=sizes, lengths=st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_documents_are_cut_one_by_one(tp_size: int, cp_size: int, lengths: list[int]) -> None:
    slots = torch.tensor([0, *(n * 2 * cp_size * tp_size for n in lengths)])
    bounds = slots.cumsum(0).int()
    num_tokens = int(bounds[-1])
    documents = torch.arange(num_tokens).split(slots[1:].tolist())
    for cp_rank in range(cp_size):
        held = []
        for document in documents:
            pieces = document.view(2 * cp_size, -1)
            held += [pieces[cp_rank], pieces[-1 - cp_rank]] if cp_size > 1 else [document]
        on_cp_rank = torch.cat(held)
        for tp_rank in range(tp_size):
            got = local_token_indices(
                num_tokens=num_tokens,
                tp_rank=tp_rank,
                tp_size=tp_size,
                cp_rank=cp_rank,
                cp_size=cp_size,
                document_bounds=bounds,
            )
            assert got.tolist() == on_cp_rank.chunk(tp_size)[tp_rank].tolist()


def test_documents_that_cannot_be_cut_are_refused() -> None:
    for bounds in ([0, 6, 12], [0, 4, 8]):
        with pytest.raises(ValueError, match=r"multiples of 4 and sum to 12 tokens; got .* Pad"):
            local_token_indices(num_tokens=12, cp_size=2, document_bounds=torch.tensor(bounds))
    with pytest.raises(ValueError, match=r"batch_size must be 1 .*; got 2"):
        local_token_indices(num_tokens=8, batch_size=2, cp_size=2, document_bounds=torch.tensor([0, 8]))


def test_golden_local_token_indices() -> None:
    assert local_token_indices(num_tokens=4).tolist() == [0, 1, 2, 3]
    assert local_token_indices(num_tokens=6, batch_size=2).tolist() == [0, 3, 1, 4, 2, 5]
    zigzag = [local_token_indices(num_tokens=8, cp_rank=rank, cp_size=2).tolist() for rank in range(2)]
    assert zigzag == [[0, 1, 6, 7], [2, 3, 4, 5]]
    last = local_token_indices(num_tokens=16, batch_size=2, cp_rank=1, cp_size=2, tp_rank=1, tp_size=2)
    assert last.tolist() == [4, 12, 5, 13]


def test_zigzag_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("megatron.core.utils")
    if "is_hybrid_cp" not in inspect.signature(utils.get_batch_on_this_cp_rank).parameters:
        pytest.skip("needs the batch partition of megatron-core 0.19")
    for cp_rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=cp_rank: rank)
        batch = {"tokens": torch.arange(24).view(1, 24), "cu_seqlens": None}
        got = local_token_indices(num_tokens=24, cp_rank=cp_rank, cp_size=3)
        want = utils.get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=object())
        assert got.tolist() == want["tokens"][0].tolist()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tp_rank": 2, "tp_size": 2}, r"tp_rank must be in \[0, tp_size\); got rank 2 of size 2"),
        ({"cp_rank": -1, "cp_size": 2}, "cp_rank must be in"),
        ({"tp_size": 0}, "tp_rank must be in"),
        ({"batch_size": 5}, "num_tokens must be a multiple of batch_size = 5; got 12"),
        ({"batch_size": 0}, "num_tokens must be a multiple of batch_size = 0"),
        ({"num_tokens": -4}, "num_tokens must be a multiple of batch_size = 1; got -4"),
        ({"cp_size": 4}, r"sequence length must be a multiple of 2 \* cp_size = 8; got 12"),
        ({"cp_size": 2, "batch_size": 2}, r"2 \* cp_size = 4; got 6"),
        ({"cp_size": 3, "tp_size": 3}, "per context-parallel rank .* tp_size = 3; got 4"),
    ],
)
def test_bad_layout(options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        local_token_indices(**{"num_tokens": 12, **options})
