"""Balance and z losses: a rank's share; the shares of all ranks sum to the loss of one process."""

from __future__ import annotations

import pytest
import torch

from emo_megatron import balance, ops

TOP_K = 2


def _route(logits):
    return ops.pool_topk(logits, top_k=TOP_K)


def _counts(routed, group=None):
    counts_X = balance.reduce_counts(routed.counts_X, group=group)
    return balance.TokenCounts.of(counts_X, num_experts=routed.routing_map_TE.shape[1])


def test_balance_loss_is_e_times_f_dot_p():
    logits = torch.randn(50, 8)
    routed = _route(logits)
    counts = _counts(routed)
    loss = balance.load_balancing_loss(routed.score_sums_E, fraction=counts, population=counts, top_k=TOP_K)
    fraction = routed.routing_map_TE.float().mean(0) / TOP_K
    assert loss == pytest.approx(float(8 * (fraction * logits.softmax(-1).mean(0)).sum()), rel=1e-6)


def test_balance_loss_is_one_when_balanced():
    logits = torch.eye(8).repeat(4, 1) * 1e-4
    scores = logits.softmax(-1).sum(0)
    counts = balance.TokenCounts(tokens_per_expert_E=torch.full((8,), 8), num_tokens=torch.tensor(32))
    loss = balance.load_balancing_loss(scores, fraction=counts, population=counts, top_k=TOP_K)
    assert loss == pytest.approx(1.0, rel=1e-5)


def test_no_gradient_through_the_fraction():
    logits = torch.randn(50, 8, requires_grad=True)
    routed = _route(logits)
    counts = _counts(routed)
    loss = balance.load_balancing_loss(routed.score_sums_E, fraction=counts, population=counts, top_k=TOP_K)
    (got,) = torch.autograd.grad(loss, [logits])
    fraction = routed.routing_map_TE.float().mean(0) / TOP_K
    (want,) = torch.autograd.grad(8 * (fraction * logits.softmax(-1).mean(0)).sum(), [logits])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_z_loss_is_the_mean_square():
    logits = torch.randn(50, 8)
    routed = _route(logits)
    want = logits.logsumexp(-1).square().mean()
    assert balance.z_loss(routed.z_T, population=_counts(routed)) == pytest.approx(float(want))


def test_an_empty_micro_batch_has_no_loss():
    routed = ops.pool_topk(torch.randn(4, 8), document_ids_T=torch.full((4,), -1), pool_DE=None, top_k=TOP_K)
    counts = balance.TokenCounts(tokens_per_expert_E=routed.tokens_per_expert_E, num_tokens=torch.tensor(0))
    loss = balance.load_balancing_loss(routed.score_sums_E, fraction=counts, population=counts, top_k=TOP_K)
    assert loss == 0.0
    assert balance.z_loss(routed.z_T, population=counts) == 0.0


def _shares(rank_logits):
    """This rank's loss shares and their gradient, with the counts reduced over all ranks."""
    import torch.distributed as dist

    logits = rank_logits[dist.get_rank()].clone().requires_grad_()
    routed = _route(logits)
    counts = _counts(routed, dist.group.WORLD)
    lb = balance.load_balancing_loss(routed.score_sums_E, fraction=counts, population=counts, top_k=TOP_K)
    z = balance.z_loss(routed.z_T, population=counts)
    (gradient,) = torch.autograd.grad(lb + z, [logits])
    return lb.item(), z.item(), gradient


def test_shares_of_two_ranks_sum_to_one_process(ranks):
    parts = [torch.randn(30, 8), torch.randn(20, 8)]
    answers = ranks(2).run(_shares, rank_logits=parts)
    whole = torch.cat(parts).requires_grad_()
    routed = _route(whole)
    counts = _counts(routed)
    lb = balance.load_balancing_loss(routed.score_sums_E, fraction=counts, population=counts, top_k=TOP_K)
    z = balance.z_loss(routed.z_T, population=counts)
    (gradient,) = torch.autograd.grad(lb + z, [whole])
    assert sum(a[0] for a in answers) == pytest.approx(lb.item(), rel=1e-5)
    assert sum(a[1] for a in answers) == pytest.approx(z.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([a[2] for a in answers]), gradient, rtol=1e-5, atol=1e-9)
