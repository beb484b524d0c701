"""Tests of emo_megatron.documents against a plain loop over tokens."""

from __future__ import annotations

import dataclasses
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emo_megatron.documents import DocumentSegments

examples = settings(deadline=None, max_examples=60)


@st.composite
def packed_lengths(draw: st.DrawFn, *, allow_empty: bool = True) -> tuple[list[list[int]], int]:
    """Document lengths of each sample of a micro-batch, and the tokens of one sample."""
    tokens_per_sample = draw(st.integers(1, 20))
    inner = range(tokens_per_sample + 1) if allow_empty else range(1, tokens_per_sample)
    cuts = st.just([])
    if inner:
        cuts = st.lists(st.sampled_from(inner), max_size=6, unique=not allow_empty)
    samples = []
    for _ in range(draw(st.integers(1, 3))):
        edges = [0, *sorted(draw(cuts)), tokens_per_sample]
        samples.append([end - start for start, end in pairwise(edges)])
    return samples, tokens_per_sample


def naive_ids(lengths: list[int], *, num_tokens: int) -> list[int]:
    """One entry a token: the number of its document; -1 past the last document."""
    ids = [document for document, length in enumerate(lengths) for _ in range(length)]
    return ids + [-1] * (num_tokens - len(ids))


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def flat(samples: list[list[int]]) -> list[int]:
    return [length for sample in samples for length in sample]


@examples
@given(packed=packed_lengths(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_from_cu_seqlens_round_trip(packed: tuple[list[list[int]], int], dtype: torch.dtype) -> None:
    samples, tokens_per_sample = packed
    lengths = flat(samples)
    num_tokens = len(samples) * tokens_per_sample
    segments = DocumentSegments.from_cu_seqlens(
        cumulative(lengths, dtype), num_tokens=num_tokens, tokens_per_sample=tokens_per_sample
    )

    assert segments.num_tokens == num_tokens
    assert segments.num_documents == len(lengths)
    assert segments.document_ids_T.dtype == segments.starts_D.dtype == torch.int64
    assert segments.document_ids_T.tolist() == naive_ids(lengths, num_tokens=num_tokens)
    ids = segments.document_ids_T
    assert torch.bincount(ids, minlength=len(lengths)).tolist() == lengths
    for document, length in enumerate(lengths):
        if length:
            start = ids.tolist().index(document)
            assert segments.starts_D[document] == start
            assert segments.rows_D[document] == start // tokens_per_sample
            assert segments.offsets_D[document] == start % tokens_per_sample
    # gathering something per sample must be safe for empty documents too
    assert all(0 <= row < len(samples) for row in segments.rows_D.tolist())
    assert all(0 <= offset <= tokens_per_sample for offset in segments.offsets_D.tolist())


@examples
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6), tail=st.integers(0, 5))
def test_tokens_past_the_last_document_are_padding(lengths: list[int], tail: int) -> None:
    num_tokens = sum(lengths) + tail
    segments = DocumentSegments.from_cu_seqlens(cumulative(lengths), num_tokens=num_tokens)
    assert segments.document_ids_T.tolist() == naive_ids(lengths, num_tokens=num_tokens)
    assert int((segments.document_ids_T < 0).sum()) == tail


@examples
@given(slots=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6), tail=st.integers(0, 4))
def test_padded_cu_seqlens(slots: list[tuple[int, int]], tail: int) -> None:
    want = []
    for document, (real, filler) in enumerate(slots):
        want += [document] * real + [-1] * filler
    want += [-1] * tail
    padded = cumulative([real + filler for real, filler in slots])
    segments = DocumentSegments.from_cu_seqlens(
        cumulative([real for real, _ in slots]), num_tokens=len(want), cu_seqlens_padded=padded
    )
    assert segments.document_ids_T.tolist() == want
    assert segments.starts_D.tolist() == padded[:-1].tolist()


def test_golden_from_cu_seqlens() -> None:
    segments = DocumentSegments.from_cu_seqlens(
        torch.tensor([0, 1, 1, 4, 6, 8, 8], dtype=torch.int32), num_tokens=8, tokens_per_sample=4
    )
    assert segments.document_ids_T.tolist() == [0, 2, 2, 2, 3, 3, 4, 4]
    assert segments.starts_D.tolist() == [0, 1, 1, 4, 6, 8]
    assert segments.rows_D.tolist() == [0, 0, 0, 1, 1, 1]
    assert segments.offsets_D.tolist() == [0, 1, 1, 0, 2, 4]
    assert segments.take(torch.tensor([[7, 0], [4, 1]])).tolist() == [[4, 0], [3, 2]]


@examples
@given(packed_lengths(), st.data())
def test_padding_at_the_end_of_samples_leaves_their_documents(
    packed: tuple[list[list[int]], int], data: st.DataObject
) -> None:
    samples, tokens_per_sample = packed
    num_padding = [data.draw(st.integers(0, tokens_per_sample)) for _ in samples]
    lengths = [length for sample in samples for length in sample]
    num_tokens = tokens_per_sample * len(samples)
    segments = DocumentSegments.from_cu_seqlens(
        cumulative(lengths), num_tokens=num_tokens, tokens_per_sample=tokens_per_sample
    )
    without = segments.without_tails(torch.tensor(num_padding))
    want = naive_ids(lengths, num_tokens=num_tokens)
    for sample, padding in enumerate(num_padding):
        end = (sample + 1) * tokens_per_sample
        want[end - padding : end] = [-1] * padding
    assert without.document_ids_T.tolist() == want
    assert torch.equal(without.starts_D, segments.starts_D)
    assert without.tokens_per_sample == tokens_per_sample


def test_no_tokens() -> None:
    segments = DocumentSegments.from_cu_seqlens(torch.tensor([0, 0]), num_tokens=0)
    assert (segments.num_tokens, segments.num_documents) == (0, 1)
    assert segments.rows_D.tolist() == [0]
    assert segments.whole_samples().num_documents == 0


def test_unchecked_values_do_not_leave_the_range() -> None:
    segments = DocumentSegments.from_cu_seqlens(
        torch.tensor([0, 5, 20]), num_tokens=8, tokens_per_sample=4, check=False
    )
    assert segments.document_ids_T.tolist() == [0] * 5 + [1] * 3


@pytest.mark.parametrize("check", [None, False])
def test_no_value_is_read_unless_wanted(check: bool | None) -> None:
    # a meta tensor has no values: reading one raises, as a host sync would stall a device
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    segments = DocumentSegments.from_cu_seqlens(
        cu, num_tokens=8, tokens_per_sample=4, cu_seqlens_padded=cu, check=check
    )
    whole = segments.whole_samples()
    assert (segments.num_tokens, segments.num_documents, whole.num_documents) == (8, 3, 2)
    assert segments.take(torch.arange(3, device="meta")).shape == (3,)
    assert segments.rows_D.shape == segments.offsets_D.shape == (3,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        DocumentSegments.from_cu_seqlens(cu, num_tokens=8, check=True)


@examples
@given(packed=packed_lengths(), data=st.data())
def test_whole_samples_keeps_only_padding(packed: tuple[list[list[int]], int], data: st.DataObject) -> None:
    samples, size = packed
    num_tokens = len(samples) * size
    segments = DocumentSegments.from_cu_seqlens(
        cumulative(flat(samples)), num_tokens=num_tokens, tokens_per_sample=size
    )
    padding = data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    ids_T = segments.document_ids_T.masked_fill(torch.tensor(padding), -1)
    whole = dataclasses.replace(segments, document_ids_T=ids_T).whole_samples()
    assert whole.document_ids_T.tolist() == [-1 if pad else at // size for at, pad in enumerate(padding)]
    assert whole.num_documents == len(samples)
    assert whole.rows_D.tolist() == list(range(len(samples)))
    assert whole.offsets_D.tolist() == [0] * len(samples)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("cu", "options", "match"),
    [
        (offsets(0, 4).view(1, 2), {}, r"cu_seqlens_q must be 1-D.*got \[1, 2\]"),
        (offsets(0), {}, r"at least two entries.*got \[1\]"),
        (offsets(), {}, r"at least two entries.*got \[0\]"),
        (torch.tensor([0.0, 4.0]), {}, "int32 or int64; got torch.float32"),
        (offsets(1, 4), {}, "must start at 0; got 1"),
        (offsets(0, 3, 2, 4), {}, "never decrease; got 3, then 2 at entry 2"),
        (offsets(0, 9), {}, "at or before num_tokens = 8; got 9"),
        (offsets(0, 5, 8), {"tokens_per_sample": 4}, r"every multiple .* = 4.*\[0, 5\)"),
        (offsets(0, 4, 8), {"tokens_per_sample": 3}, "num_tokens must be a multiple of .* = 3"),
        (offsets(0, 8), {"tokens_per_sample": 0}, "num_tokens must be a multiple of .* = 0"),
        (offsets(0, 0), {"num_tokens": -1}, "num_tokens must be a multiple.*got -1"),
        (offsets(0, 4), {"cu_seqlens_padded": offsets(0, 4, 8)}, r"must match.*\[2\].*got \[3\]"),
        (offsets(0, 4), {"cu_seqlens_padded": torch.tensor([0, 4])}, "must match.*torch.int64"),
        (offsets(0, 4), {"cu_seqlens_padded": offsets(2, 8)}, "cu_seqlens_padded must start at 0"),
        (offsets(0, 0, 1), {"cu_seqlens_padded": offsets(0, 4, 3)}, "cu_seqlens_padded must never"),
        (offsets(0, 4), {"cu_seqlens_padded": offsets(0, 9)}, "cu_seqlens_padded must end"),
        (offsets(0, 2, 4), {"tokens_per_sample": 4, "cu_seqlens_padded": offsets(0, 6, 8)}, "every multiple"),
        (offsets(0, 1, 5), {"cu_seqlens_padded": offsets(0, 2, 5)}, "document 1 has 4 tokens.* 3"),
    ],
)
def test_bad_cu_seqlens(cu: Tensor, options: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {"num_tokens": 8, **options}
    with pytest.raises(ValueError, match=match):
        DocumentSegments.from_cu_seqlens(cu, **arguments)  # type: ignore[arg-type]


def test_padding_between_documents_changes_no_offset():
    """Pool sizes are drawn from offsets, and how much padding a layout needs must not change them."""
    cu = torch.tensor([0, 3, 3, 10, 12, 12])
    found = []
    for padded in ([0, 4, 4, 16, 20, 32], [0, 8, 8, 16, 24, 32]):
        segments = DocumentSegments.from_cu_seqlens(
            cu, num_tokens=32, tokens_per_sample=16, cu_seqlens_padded=torch.tensor(padded)
        )
        found.append((segments.rows_D.tolist(), segments.offsets_D.tolist()))
    assert found == [([0, 0, 0, 1, 1], [0, 3, 3, 0, 2])] * 2
