"""Padding at the end of a short sample, which Megatron counts to its last document, has no vote in a pool."""

from __future__ import annotations

import torch
from support import tiny

from emo_megatron.config import PoolConfig

SEQ = 24


def test_samples_tell_their_padding(ranks, tmp_path):
    from emo_megatron.mcore.dataset import write_indexed_dataset

    # 60 tokens of documents of 12 ends in a sample of 24 and one that is short
    documents = [[value] * 12 for value in (5, 6, 7, 8, 9)]
    write_indexed_dataset(tmp_path / "text", documents, vocab_size=512)
    *samples, nothing = ranks(1).run(tiny.validation_samples, prefix=tmp_path / "text", cache=tmp_path / "cache")[0]
    padding = [sample["num_padding"] for sample in samples]
    assert nothing["num_padding"] == SEQ
    assert sorted(padding)[:-1] == [0] * (len(padding) - 1)
    short = samples[padding.index(max(padding))]
    assert 0 < max(padding) < SEQ
    real = SEQ - max(padding)
    assert (short["tokens"][:real] >= 5).all()
    assert not short["tokens"][real:].any()
    assert short["cu_seqlens"][-1] == SEQ, "Megatron counts padding to a document; if not, this can go"


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
