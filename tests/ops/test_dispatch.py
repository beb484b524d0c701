"""Layout, copies and sums against loops over tokens and pairs."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.ops.dispatch import (
    copy_rows,
    count_sends,
    fan_out,
    plan_receive,
    plan_send,
    sum_rows,
)


def _routing(num_tokens, num_experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, True)


def _plan(routing, num_ranks):
    counts = count_sends(routing, num_ranks=num_ranks).tolist()
    rows, pairs = counts[:num_ranks], counts[num_ranks:]
    plan = plan_send(routing, num_ranks=num_ranks, num_rows=sum(rows), num_pairs=sum(pairs))
    return rows, pairs, plan


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_ranks", "top_k"),
    [(7, 8, 2, 3), (33, 16, 4, 1), (5, 6, 1, 2), (9, 6, 6, 6), (0, 8, 2, 2)],
)
def test_plan_sends_each_token_to_a_rank_once(num_tokens, num_experts, num_ranks, top_k):
    routing = _routing(num_tokens, num_experts, top_k)
    rows, pairs, plan = _plan(routing, num_ranks)
    here = num_experts // num_ranks
    want_tokens, want_places, want_codes = [], [], []
    for rank in range(num_ranks):
        sent = 0
        for token in range(num_tokens):
            experts = [e for e in range(here) if routing[token, rank * here + e]]
            want_tokens += [token] * bool(experts)
            sent += bool(experts)
            for place, expert in enumerate(experts):
                want_places.append(token * num_experts + rank * here + expert)
                want_codes.append(2 * expert + (place == 0))
        assert rows[rank] == sent
    assert pairs == routing.sum(0).tolist()
    assert plan.rows.source_P.tolist() == want_tokens
    assert plan.places_P.tolist() == want_places
    assert plan.codes_P.tolist() == want_codes


def test_received_pairs_are_put_in_the_order_of_experts():
    routing = _routing(11, 8, 3)
    rows, _, plan = _plan(routing, 2)
    codes = plan.codes_P[: int(routing[:, :4].sum())]
    received = plan_receive(codes, num_rows=rows[0])
    experts = (codes >> 1)[received.order_P]
    assert experts.tolist() == sorted(experts.tolist())
    tokens = plan.rows.source_P[received.pairs.source_P]
    want = [(e, t) for e in range(4) for t in range(11) if routing[t, e]]
    assert list(zip(experts.tolist(), tokens.tolist(), strict=True)) == want


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_copies_and_sums_are_each_others_gradients(dtype):
    source = torch.tensor([2, 0, 2, 4, 2, 0])
    fanout = fan_out(source, num_sources=5)
    rows = torch.randn(5, 3, dtype=torch.float64).to(dtype).requires_grad_()
    copies = torch.randn(6, 3, dtype=torch.float64).to(dtype).requires_grad_()
    want_sum = torch.zeros(5, 3, dtype=torch.float64).index_add_(
        0, source, copies.detach().double()
    )
    got_copies, got_sum = copy_rows(rows, fanout=fanout), sum_rows(copies, fanout=fanout)
    assert torch.equal(got_copies, rows.detach()[source])
    torch.testing.assert_close(
        got_sum.double(), want_sum, atol=1e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )
    assert torch.equal(got_sum[1], torch.zeros(3, dtype=dtype))
    # <sum(c), r> = <c, copy(r)>: each is the other's transpose, so backward of one is forward of the other
    got_sum.backward(rows.detach())
    got_copies.backward(copies.detach())
    assert torch.equal(copies.grad, got_copies.detach())
    assert torch.equal(rows.grad, got_sum.detach())


def test_bf16_sums_are_rounded_once():
    copies = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    fanout = fan_out(torch.zeros(3, dtype=torch.int64), num_sources=1)
    assert sum_rows(copies, fanout=fanout).item() == 258


def test_ranks_must_hold_equally_many_experts():
    with pytest.raises(ValueError, match="got 6 experts, 4 ranks"):
        count_sends(_routing(3, 6, 2), num_ranks=4)
