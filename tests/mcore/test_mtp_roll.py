"""The roll of all packed documents at once gives what Megatron's loop over documents gives, in every layout."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcore.test_metrics import Operations
from megatron.core import parallel_state
from megatron.core.transformer import multi_token_prediction
from support import tiny

from emo_megatron.mcore import mtp
from emo_megatron.sharding import local_token_indices

DTYPES = ["int64", "int32", "float32", "float64", "bfloat16", "bool"]
PIECES = {
    "one document": [5],
    "several": [1, 3, 2],
    "documents of one piece a rank": [1, 1, 1, 1],
    "empty at both ends and between": [0, 0, 2, 0, 1, 0, 4, 0, 0],
    "many": [1, 2, 0, 3] * 10,
}
"""Lengths of documents in multiples of 2 x context-parallel ranks."""


def _packed(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return tiny.packed(bounds.tolist())


def _values(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    if dtype.startswith("int"):
        return torch.randint(1, 1000, shape, generator=generator, dtype=getattr(torch, dtype))
    return torch.randn(shape, generator=generator).to(getattr(torch, dtype))


def _same(got, want):
    """Whether two rolls agree in every bit of values and sum."""
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    tail=st.integers(0, 4),
    cut=st.integers(0, 3),
    lead=st.sampled_from([(), (1,), (3,)]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=150, deadline=None)
def test_equals_megatrons_roll(lengths, tail, cut, lead, dtype):
    """Documents may be empty or of one token; tokens may lie behind the last document, or the last be cut short."""
    num_tokens = max(sum(lengths) + tail - cut, 0)
    tensor, packed = _values((*lead, num_tokens), dtype), _packed(lengths)
    before = tensor.clone()
    got = mtp.roll_packed(tensor, -1, -1, packed)
    assert _same(got, mtp._HOST_ROLL(tensor, -1, -1, packed))
    assert torch.equal(tensor, before)


def _roll_on_ranks(packings, dtypes):
    """Of each packing and dtype: whether this rank's roll is Megatron's, and the part of the whole micro-batch's."""
    size = torch.distributed.get_world_size()
    tiny.setup(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    found = []
    mtp.use_packed_roll()
    for lengths in packings:
        packed = _packed([2 * size * length for length in lengths])
        num_tokens = int(packed.cu_seqlens_q[-1])
        held_T = local_token_indices(
            num_tokens=num_tokens, cp_rank=group.rank(), cp_size=size, document_bounds=packed.cu_seqlens_q
        )
        for dtype in dtypes:
            tensor = _values((1, num_tokens), dtype)
            local = tensor[:, held_T]
            got = multi_token_prediction.roll_tensor(local, cp_group=group, packed_seq_params=packed)
            megatrons = mtp._HOST_ROLL(local, -1, -1, packed, group)
            whole, _ = mtp._HOST_ROLL(tensor, -1, -1, packed)
            found.append((_same(got, megatrons), torch.equal(got[0], whole[:, held_T])))
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_megatrons_roll_under_context_parallelism(ranks, world):
    for found in ranks(world).run(_roll_on_ranks, packings=list(PIECES.values()), dtypes=DTYPES):
        assert found == [(True, True)] * (len(DTYPES) * len(PIECES))


def _operations(num_documents, host=False):
    """Operations of a roll of so many documents on this rank, and its collectives and messages."""
    size = torch.distributed.get_world_size()
    tiny.setup(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    packed = _packed([2 * size] * num_documents)
    local = _values((1, 2 * num_documents), "int64")
    roll = mtp._HOST_ROLL if host else mtp.roll_packed
    with Operations() as operations:
        roll(local, -1, -1, packed, group)
    sent = {"_allgather_base_", "send", "recv_"}
    return operations.count, sum(operations.seen[name] for name in sent)


@pytest.mark.parametrize(("world", "collectives"), [(1, 0), (2, 1)])
def test_operations_do_not_grow_with_documents(ranks, world, collectives):
    few = ranks(world).run(_operations, num_documents=3)
    many = ranks(world).run(_operations, num_documents=300)
    assert few == many
    assert {sent for _, sent in many} == {collectives}
    # those of Megatron's roll do
    theirs = ranks(world).run(_operations, num_documents=300, host=True)
    assert all(operations > 300 and sent >= 300 * collectives for operations, sent in theirs)


def test_takes_the_place_of_megatrons_roll(monkeypatch):
    monkeypatch.setattr(multi_token_prediction, "_roll_tensor_packed_seq", mtp._HOST_ROLL)
    for _ in range(2):
        mtp.use_packed_roll()
        assert multi_token_prediction._roll_tensor_packed_seq is mtp.roll_packed
    rolled, total = multi_token_prediction.roll_tensor(torch.arange(1, 7)[None], packed_seq_params=_packed([4, 2]))
    assert rolled.tolist() == [[2, 3, 4, 0, 6, 0]]
    assert int(total) == 15
    assert inspect.signature(mtp.roll_packed).parameters.keys() == (inspect.signature(mtp._HOST_ROLL).parameters.keys())


@pytest.mark.parametrize("host", [None, lambda tensors, shifts, dims, fill_values: None])
def test_another_megatron_keeps_its_roll(monkeypatch, host):
    monkeypatch.setattr(multi_token_prediction, "_roll_tensor_packed_seq", host)
    monkeypatch.setattr(mtp, "_HOST_ROLL", host)
    mtp.use_packed_roll()
    assert multi_token_prediction._roll_tensor_packed_seq is host


def test_documents_cut_otherwise_are_megatrons(monkeypatch):
    monkeypatch.setattr(mtp, "_HOST_ROLL", lambda *arguments: arguments)
    tensor, packed = torch.arange(8), _packed([4, 4])
    packed.cp_partition_mode = "contiguous"
    assert mtp.roll_packed(tensor, -1, -1, packed) == (tensor, -1, -1, packed, None)
    packed.cp_partition_mode = "zigzag"
    assert mtp.roll_packed(tensor, -1, -1, packed)[0].tolist() == [1, 2, 3, 0, 5, 6, 7, 0]


@pytest.mark.parametrize("shifts_and_dims", [(-2, -1), (-1, 0)])
def test_other_rolls_are_megatrons_to_refuse(shifts_and_dims):
    with pytest.raises(AssertionError):
        mtp.roll_packed(torch.ones(1, 8), *shifts_and_dims, _packed([8]))


def test_documents_that_cannot_be_cut_are_refused():
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        mtp.roll_packed(torch.ones(1, 5), -1, -1, _packed([4, 6]), group)
