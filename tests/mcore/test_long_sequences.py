"""Samples of 128k tokens under context parallelism: work grows with tokens, and not with documents.

Counted and not timed, on one of two context-parallel ranks. Attention is no part of it: without Transformer Engine
DocumentAttention makes a mask of all pairs of tokens.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from mcore.test_metrics import Operations
from support import tiny
from support.work import measured

TOKENS = (32768, 65536, 131072)
MANY = 4000
EXPERTS, TOP_K, LAYERS, HIDDEN = 16, 2, 4, 8
WORLD = 2
ONCE = 100
"""Lines of the package that run only now and then; a loop over documents would run thousands."""
MOST_BYTES = 64 * EXPERTS
"""Of all tensors made for one token or for one document: a few numbers for each expert."""


def _bounds(num_tokens, num_documents):
    """[D + 1] int32: documents of many lengths that fill one sample."""
    generator = torch.Generator().manual_seed(num_documents)
    cuts = torch.randperm(num_tokens - 1, generator=generator)[: num_documents - 1] + 1
    return torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([num_tokens])]).int()


def _pools():
    from emo_megatron.config import PoolConfig

    return PoolConfig(pool_min=3, pool_cp_partition="document")


def _shard(group):
    from emo_megatron.mcore.context import Shard

    return Shard(
        **{"tp_rank": 0, "tp_size": 1, "cp_rank": group.rank(), "cp_size": WORLD},
        **{"dp_rank": 0, "dp_size": 1, "microbatch": 0},
    )


def _packed(num_tokens, num_documents):
    """Boundaries as packed and as padded, and what Megatron's layers get."""
    from emo_megatron.mcore.padding import Packing, packed_params, padded_bounds, padding_multiple

    cu_seqlens = _bounds(num_tokens, num_documents)
    bounds = padded_bounds(cu_seqlens, multiple=padding_multiple(cp_size=WORLD, tp_size=1))
    packing = Packing(
        cu_seqlens=cu_seqlens, tokens_per_sample=num_tokens, num_samples=1, num_padding_B=torch.tensor([3])
    )
    packed = packed_params(packing, longest=int(bounds.diff().max()), bounds=bounds)
    return cu_seqlens, bounds, packed


def _work(num_tokens, num_documents, backend):
    """The micro-batch's padded length, and the work of each piece on this rank."""
    from megatron.core import parallel_state

    from emo_megatron import ops
    from emo_megatron.mcore import context, mtp, padding

    tiny.setup(context_parallel_size=WORLD)
    group = parallel_state.get_context_parallel_group()
    work = {}

    def measure(name, call):
        result, work[name] = measured(call)
        return result

    def pad_and_cut():
        cu_seqlens, bounds, packed = _packed(num_tokens, num_documents)
        keys = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32}
        batch = {key: torch.ones(1, num_tokens, dtype=dtype) for key, dtype in keys.items()}
        cut = padding.cut_by_document(
            batch,
            tuple(keys),
            cu_seqlens=cu_seqlens,
            bounds=bounds,
            num_tokens=int(bounds[-1]),
            cp_rank=group.rank(),
            cp_size=WORLD,
        )
        return packed, cut

    def make_scope():
        shape = torch.Size([cut["tokens"].shape[1], 1, HIDDEN])
        return context.scope_of(packed, hidden_shape=shape, shard=_shard(group), pool=_pools(), layer_number=1)

    def draw_sizes():
        return scope.draw_sizes(_pools(), num_layers=LAYERS, low=3, high=EXPERTS, num_experts=EXPERTS)

    def choose_pools():
        scores_DE = ops.document_scores(
            logits_TE.detach(), document_ids_T=scope.document_ids_T, num_documents=num_documents, backend=backend
        )
        return ops.select_pool(scores_DE, pool_sizes_D=sizes_LD[0], backend=backend)

    def route():
        routing = ops.pool_topk(
            logits_TE, document_ids_T=scope.document_ids_T, pool_DE=pool_DE, top_k=TOP_K, backend=backend
        )
        routing.probs_TE.square().sum().backward()

    context.CLOCK.consumed_samples = 0
    packed, cut = measure("padding and cut", pad_and_cut)
    scope = measure("scope", make_scope)
    measure("ids of depth 1", lambda: scope.ids_at(1))
    measure("roll", lambda: mtp.roll_packed(cut["tokens"], -1, -1, packed, group))
    sizes_LD = measure("sizes", draw_sizes)
    logits_TE = torch.randn(cut["tokens"].shape[1], EXPERTS).requires_grad_()
    pool_DE = measure("pools", choose_pools)
    measure("routing, forward and backward", route)
    context.CLOCK.consumed_samples = None
    return int(packed.cu_seqlens_q[-1]), work


@pytest.fixture(scope="module", params=["reference", "native"])
def works(ranks, request):
    """(tokens, documents) -> padded length and work of each piece, and the backend of the ops."""

    def work(num_tokens, num_documents):
        return ranks(WORLD).run(_work, num_tokens=num_tokens, num_documents=num_documents, backend=request.param)[0]

    # whatever is computed once in a process
    work(64, 2)
    sizes = [(TOKENS[0], 2), *itertools.product(TOKENS, (1, MANY))]
    return {size: work(*size) for size in sizes}


def test_operations_do_not_grow(works):
    """Neither with documents nor with tokens; torch and the reference ops have a shorter way for one document."""
    _, want = works[TOKENS[0], MANY]
    for (_, documents), (_, work) in works.items():
        for piece, got in work.items():
            if documents == 1:
                assert got.operations <= want[piece].operations + 2, piece
            else:
                assert got.operations == want[piece].operations, piece
            assert abs(got.lines - want[piece].lines) < ONCE, piece


def test_no_tensor_has_a_place_for_every_token_and_document(works):
    for (tokens, documents), (padded, work) in works.items():
        assert tokens <= padded <= tokens + 3 * documents
        for piece, got in work.items():
            assert got.largest <= (padded + documents) * EXPERTS, piece
    # and not because documents are few
    assert tokens * MANY > 100 * (padded + MANY) * EXPERTS


def test_memory_grows_linearly_with_tokens_and_documents(works):
    for piece in works[TOKENS[0], 1][1]:
        slopes = []
        for documents in (1, MANY):
            sizes = [works[tokens, documents] for tokens in TOKENS]
            rises = [
                (more[piece].num_bytes - less[piece].num_bytes) / (longer - shorter)
                for (shorter, less), (longer, more) in itertools.pairwise(sizes)
            ]
            assert rises[0] == pytest.approx(rises[1], rel=0.01, abs=0.01), piece
            slopes += rises
        assert max(slopes) == pytest.approx(min(slopes), rel=0.05, abs=0.01), piece
        assert max(slopes) <= MOST_BYTES
        for tokens in TOKENS:
            (shorter, one), (longer, many) = works[tokens, 1], works[tokens, MANY]
            for_documents = many[piece].num_bytes - one[piece].num_bytes
            assert for_documents <= MOST_BYTES * (MANY + longer - shorter), piece


def _rolls():
    """Operations of a roll of many documents, ours and Megatron's."""
    from megatron.core import parallel_state

    from emo_megatron.mcore import mtp

    tiny.setup(context_parallel_size=WORLD)
    group = parallel_state.get_context_parallel_group()
    _, bounds, packed = _packed(TOKENS[-1], MANY)
    local = torch.arange(int(bounds[-1]) // WORLD)[None]
    found = []
    for roll in (mtp.roll_packed, mtp._HOST_ROLL):
        with Operations() as operations:
            rolled, _ = roll(local, -1, -1, packed, group)
        found.append((operations.count, rolled))
    (ours, got), (theirs, want) = found
    assert torch.equal(got, want)
    return ours, theirs


def test_megatrons_roll_has_operations_for_every_document(ranks):
    for ours, theirs in ranks(WORLD).run(_rolls):
        assert ours < 50
        assert theirs > 10 * MANY


def _layer(num_tokens, num_documents):
    """A MoE layer with pools, forward and backward: its work, its pools, and how many tokens left their pool."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from emo_megatron.mcore import context
    from emo_megatron.mcore.metrics import install_metrics

    tiny.setup(context_parallel_size=WORLD)
    group = parallel_state.get_context_parallel_group()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    model = tiny.model(
        _pools(),
        **{"hidden_size": HIDDEN, "num_moe_experts": EXPERTS, "moe_ffn_hidden_size": HIDDEN},
        **{"moe_shared_expert_intermediate_size": HIDDEN, "context_parallel_size": WORLD},
    )
    install_metrics(_pools(), model.config, has_documents=True)
    layer = model.decoder.layers[0].mlp
    maps = []
    layer.router.register_forward_hook(lambda *called: maps.append(called[2][1]))
    _, bounds, packed = _packed(num_tokens, num_documents)
    hidden = torch.randn(int(bounds[-1]) // WORLD, 1, HIDDEN, requires_grad=True)
    context.CLOCK.consumed_samples = 0

    def step():
        layer.scope = scope = context.scope_of(
            packed, hidden_shape=hidden.shape, shard=_shard(group), pool=_pools(), layer_number=1
        )
        output, _ = layer(hidden)
        output.square().sum().backward()
        return scope

    scope, work = measured(step)
    context.CLOCK.consumed_samples = None
    is_real_T = scope.document_ids_T >= 0
    pool_TE = scope.pools[1][scope.document_ids_T.clamp(min=0)]
    left = (maps[0].bool() & ~pool_TE)[is_real_T].any(-1).sum()
    assert hidden.grad.isfinite().all()
    return {
        **{"work": work, "pools": scope.pools[1].tolist(), "left": int(left)},
        **{"real": int(is_real_T.sum()), "padded": len(hidden) * WORLD},
    }


@pytest.mark.parametrize("documents", [1, MANY])
def test_a_layer_routes_a_long_sample(ranks, documents):
    """All of the layer but attention: pools over both ranks, routing, experts, losses, metrics, and backward."""
    ranks(WORLD).run(_layer, num_tokens=64, num_documents=2)
    few = ranks(WORLD).run(_layer, num_tokens=TOKENS[0], num_documents=2)
    many = ranks(WORLD).run(_layer, num_tokens=TOKENS[-1], num_documents=documents)
    # the rest is padding
    assert sum(answer["real"] for answer in many) == TOKENS[-1] - 3
    assert [answer["left"] for answer in many] == [0] * WORLD
    assert many[0]["pools"] == many[1]["pools"]
    assert len(many[0]["pools"]) == documents
    for less, more in zip(few, many, strict=True):
        assert more["work"].operations <= less["work"].operations + 2
        assert abs(more["work"].lines - less["work"].lines) < ONCE
        assert more["work"].largest <= more["padded"] * EXPERTS
