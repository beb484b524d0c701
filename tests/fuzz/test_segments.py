"""DocumentSegments of any tensors: the documents that a plain loop finds, or one line that names the argument."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from fuzz.judge import both_sizes, fuzz, read_or_refused
from hypothesis import strategies as st

from emo_megatron.documents import DocumentSegments

ODD = st.sampled_from((0, 1, -1, 2, 7, 2**31 - 1, -(2**31), 2**62))
DTYPES = st.sampled_from((*(torch.int64, torch.int32) * 3, torch.int16, torch.uint8, torch.bool, torch.float32))
SHAPES = st.sampled_from(((-1,),) * 6 + ((1, -1), (-1, 1)))


def tensors(values: st.SearchStrategy[list[int]]) -> st.SearchStrategy[torch.Tensor]:
    return st.builds(lambda v, d, s: torch.tensor(v).to(d).reshape(s), values, DTYPES, SHAPES)


ENDS = st.lists(st.integers(0, 5), max_size=6).map(lambda found: [0, *accumulate(found)])
BOUNDS = tensors(ENDS | st.lists(st.integers(-1, 20) | ODD, max_size=6))
ARGUMENTS = st.fixed_dictionaries(
    {"cu_seqlens_q": BOUNDS, "num_tokens": st.integers(-1, 30)},
    optional={"tokens_per_sample": st.integers(-1, 30), "cu_seqlens_padded": BOUNDS},
)


def check_lengths(given: dict[str, Any]) -> None:
    names = ("cu_seqlens", "num_tokens", "tokens_per_sample")
    found = read_or_refused(lambda: DocumentSegments.from_cu_seqlens(**given), named=names)
    if found is None:
        return
    cu, num_tokens = given["cu_seqlens_q"].tolist(), given["num_tokens"]
    bounds = given.get("cu_seqlens_padded", given["cu_seqlens_q"]).tolist()
    ids = [-1] * num_tokens
    for document, (start, low, high) in enumerate(zip(bounds, cu, cu[1:], strict=False)):
        ids[start : start + high - low] = [document] * (high - low)
    assert (found.document_ids_T.tolist(), found.starts_D.tolist()) == (ids, bounds[:-1])
    size = given.get("tokens_per_sample") or max(num_tokens, 1)
    assert all(a == b or a // size == (b - 1) // size for a, b in pairwise(bounds))


@both_sizes
def test_lengths(inputs: int) -> None:
    fuzz(inputs, ARGUMENTS, check_lengths)
