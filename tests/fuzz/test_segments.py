"""DocumentSegments of any tensors: the documents that a plain loop finds, or one line that names the argument."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from fuzz.judge import both_sizes, fuzz, read_or_refused
from hypothesis import strategies as st
from torch import Tensor

from emo_megatron.documents import DocumentSegments

ODD = st.sampled_from((0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**62))
DTYPES = st.sampled_from(
    (*(torch.int64, torch.int32) * 3, torch.int16, torch.uint8, torch.bool, torch.float32)
)
SHAPES = st.sampled_from(((-1,),) * 6 + ((1, -1), (-1, 1), (2, -1)))


def tensor(values: list[int], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    found = torch.tensor(values, dtype=torch.int64).to(dtype)
    return found.reshape(shape) if found.numel() % 2 == 0 or 2 not in shape else found


lengths = st.lists(st.integers(0, 5), max_size=6)
bounds = st.builds(lambda found: [0, *accumulate(found)], lengths) | st.lists(
    st.integers(-1, 20) | ODD, max_size=6
)
CU_SEQLENS = st.fixed_dictionaries(
    {
        "cu_seqlens_q": st.builds(tensor, bounds, DTYPES, SHAPES),
        "num_tokens": st.integers(-1, 30),
    },
    optional={
        "tokens_per_sample": st.integers(-1, 30),
        "cu_seqlens_padded": st.builds(tensor, bounds, DTYPES, SHAPES),
        "check": st.sampled_from((True, None)),
    },
)
ROWS = st.builds(
    tensor,
    st.lists(st.integers(0, 3) | ODD, max_size=12),
    DTYPES,
    st.sampled_from(((1, -1),) * 3 + ((2, -1), (-1, 1), (-1,))),
)
PADDED_ROWS = st.tuples(
    ROWS,
    st.none() | st.lists(st.booleans(), min_size=12, max_size=12),
    st.booleans(),
)


def by_loop(cu: list[int], bounds: list[int], *, num_tokens: int) -> list[int]:
    ids = [-1] * num_tokens
    for document, (start, low, high) in enumerate(zip(bounds, cu, cu[1:], strict=False)):
        ids[start : start + high - low] = [document] * (high - low)
    return ids


def check_cu_seqlens(given: dict[str, Any]) -> None:
    names = ("cu_seqlens", "num_tokens", "tokens_per_sample")
    found = read_or_refused(lambda: DocumentSegments.from_cu_seqlens(**given), named=names)
    if found is None:
        return
    cu, num_tokens = given["cu_seqlens_q"].tolist(), given["num_tokens"]
    padded = given.get("cu_seqlens_padded")
    bounds = cu if padded is None else padded.tolist()
    assert found.document_ids_T.tolist() == by_loop(cu, bounds, num_tokens=num_tokens)
    assert found.starts_D.tolist() == bounds[:-1]
    size = given.get("tokens_per_sample") or max(num_tokens, 1)
    assert all(a == b or a // size == (b - 1) // size for a, b in pairwise(bounds))


def opened_by_loop(row: list[int], padding: list[bool], *, kind: str) -> list[bool]:
    """Which real tokens of a sample open a document."""
    real = [at for at, is_padding in enumerate(padding) if not is_padding]
    opens = []
    for place, at in enumerate(real):
        before = row[real[place - 1]] if place else None
        opens.append(
            before is None
            or (kind == "eod" and before == 3)
            or (kind == "eos" and row[at] == 3)
            or (kind == "position" and (row[at] == 0 or row[at] != before + 1))
        )
    return opens


def check_rows(given: tuple[Tensor, list[bool] | None, bool], *, kind: str) -> None:
    rows, padding, starts = given
    is_padding = None
    if padding is not None:
        flags = torch.tensor(padding[: rows.numel()], dtype=torch.bool)
        is_padding = flags.reshape(rows.shape) if flags.numel() == rows.numel() else flags
    if kind == "position":
        read = lambda: DocumentSegments.from_position_ids(rows, is_padding_BS=is_padding)  # noqa: E731
    else:
        kind = "eos" if starts else "eod"
        read = lambda: DocumentSegments.from_eod(  # noqa: E731
            rows, eod_token=3, eos_starts_document=starts, is_padding_BS=is_padding
        )
    found = read_or_refused(read, named=("_BS",))
    if found is None:
        return
    wanted, document = [], -1
    masks = [[False] * rows.shape[1]] * len(rows) if is_padding is None else is_padding.tolist()
    for row, mask in zip(rows.tolist(), masks, strict=True):
        opens = iter(opened_by_loop(row, mask, kind=kind))
        for is_filler in mask:
            document += 0 if is_filler else next(opens)
            wanted.append(-1 if is_filler else document)
    assert found.document_ids_T.tolist() == wanted
    assert found.num_documents == document + 1


@both_sizes
@pytest.mark.parametrize("kind", ["lengths", "eod", "position"])
def test_segments(kind: str, inputs: int) -> None:
    if kind == "lengths":
        fuzz(inputs, CU_SEQLENS, check_cu_seqlens)
    else:
        fuzz(inputs, PADDED_ROWS, lambda given: check_rows(given, kind=kind))
