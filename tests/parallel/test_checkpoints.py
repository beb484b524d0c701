"""A model saved under one layout loads under another: the same bits, and the same next loss to 1e-6."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing
from support import shards, training
from support.training import Case

SINGLE = Case()
TP2 = Case(name="TP2", tp=2)
PP2 = Case(name="PP2", pp=2)
EP2 = Case(name="EP2", dp=2, ep=2)
VPP2 = Case(name="PP2 x VPP2", pp=2, vpp=2)
TP2_EP2 = Case(name="TP2 x EP2", tp=2, dp=2, ep=2)


def _save(case, folder):
    """Write the model through Megatron's distributed checkpoint; its tensors and first loss."""
    chunks, _ = training.build(case, seed=5)
    weights = shards.parts([chunk.module for chunk in chunks])
    dist_checkpointing.save(_state(chunks), folder)
    return weights, _loss(case, chunks)


def _load(case, folder):
    """A model of other weights after loading that checkpoint; its tensors and first loss."""
    chunks, _ = training.build(case, seed=6)
    state = dist_checkpointing.load(_state(chunks), folder)
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state[f"model{index}"])
    return shards.parts([chunk.module for chunk in chunks]), _loss(case, chunks)


def _state(chunks):
    return {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(chunks)}


def _loss(case, chunks):
    """The first step's loss over all samples, on the ranks that have it."""
    losses = training.forward_backward(case, chunks, consumed=0)
    training.break_cycles(chunks)
    return losses


@pytest.mark.parametrize(
    ("before", "after"), [(TP2, EP2), (PP2, SINGLE), (SINGLE, TP2_EP2), (VPP2, TP2)], ids=lambda case: case.name
)
def test_weights_are_the_same_under_another_layout(ranks, tmp_path, before, after):
    # the same samples a step, however many data-parallel ranks share them
    before = training.with_samples(before, 2)
    after = training.with_samples(after, 2)
    saved = ranks(before.world_size).run(_save, case=before, folder=str(tmp_path))
    loaded = ranks(after.world_size).run(_load, case=after, folder=str(tmp_path))
    wanted = shards.join([parts for parts, _ in saved])
    found = shards.join([parts for parts, _ in loaded])
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    (was,) = {loss for _, loss in saved if loss is not None}
    (now,) = {loss for _, loss in loaded if loss is not None}
    assert now == pytest.approx(was, rel=1e-6)
