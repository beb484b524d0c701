"""Logits that are not finite: one meaning in the reference, the CPU kernels and the CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.emulator import Compiled
from support.routing import assert_close, assert_equal, random_logits
from torch import Tensor

from emo_megatron.ops import reference
from emo_megatron.ops.reference import Routing

NAN, INF = torch.nan, torch.inf
NUM_EXPERTS = 40
POOL_DE = torch.arange(NUM_EXPERTS).expand(4, -1) % torch.tensor([[2], [3], [40], [5]]) == 1
"""Of the third document one expert, fewer than K; tokens of the fourth are all non-finite."""
IN, OUT = 7, 8
"""An expert inside the pools of the documents 0 and 1, and one outside of both."""
ROWS: list[tuple[int, dict[int, float] | float, bool]] = [
    # document, values at experts (or everywhere), whether the token is non-finite
    (0, {}, False),
    (0, {IN: NAN}, True),
    (0, {OUT: NAN}, True),
    (0, {IN: -NAN}, True),
    (0, {IN: INF}, True),
    (1, {OUT: INF}, True),
    (1, {IN: -INF}, False),
    (1, {OUT: -INF}, False),
    (1, {IN: INF, OUT: NAN, 39: -INF}, True),
    (1, -INF, True),
    (1, NAN, True),
    (0, {expert: -INF for expert in range(NUM_EXPERTS) if expert not in (1, 5)}, False),
    (2, {}, False),
    (2, {OUT: NAN}, True),
    (3, {0: NAN}, True),
    (3, {39: INF}, True),
    (-1, {}, False),
    (-1, {IN: NAN}, False),
    (-1, {OUT: INF}, False),
    (-1, -INF, False),
    (1, {}, False),
]
IDS_T = torch.tensor([document for document, *_ in ROWS])
IS_NONFINITE_T = torch.tensor([is_nonfinite for *_, is_nonfinite in ROWS])
TOP_K = 3


def logits_of(rows: list[Any], dtype: torch.dtype) -> Tensor:
    logits_TE = random_logits(len(rows), NUM_EXPERTS, seed=6).to(dtype)
    for token, (_, values, _) in enumerate(rows):
        if isinstance(values, float):
            logits_TE[token] = values
        else:
            for expert, value in values.items():
                logits_TE[token, expert] = value
    return logits_TE


def run(ops: Any, device: torch.device, dtype: torch.dtype, rows: Tensor, **options: Any) -> tuple[Routing, Tensor]:
    """Route some of the tokens, and send gradients back."""
    logits_TE = logits_of(ROWS, dtype)[rows].to(device).requires_grad_()
    routed = ops.pool_topk(logits_TE, document_ids_T=IDS_T[rows].to(device), pool_DE=POOL_DE.to(device), **options)
    weights_TE = random_logits(len(ROWS), NUM_EXPERTS, seed=9)[rows].to(device)
    loss = (routed.probs_TE * weights_TE).sum() + routed.z_T.square().sum()
    loss = loss + routed.score_sums_E @ weights_TE[0]
    loss.backward()
    assert loss.isnan() == IS_NONFINITE_T[rows].any()
    return routed, logits_TE.grad


pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]
OPTIONS = {
    "paper": {},
    "renormalised": {"pre_softmax": False, "scaling_factor": 2.5},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid, biased": {"score_function": "sigmoid", "expert_bias_E": torch.linspace(-0.5, 0.5, NUM_EXPERTS)},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus"},
    "groups": {"num_groups": 8, "group_topk": 1},
}


@pytest.mark.parametrize("mask", ["logits", "selection"])
@pytest.mark.parametrize("variant", OPTIONS)
def test_such_tokens_count_nowhere_and_show_in_the_weights(
    implementation: Compiled, variant: str, mask: str, dtype: torch.dtype
) -> None:
    ops, device = implementation.ops, implementation.device
    options = {**OPTIONS[variant], "mask": mask, "top_k": TOP_K}
    if "expert_bias_E" in options:
        options["expert_bias_E"] = options["expert_bias_E"].to(device)
    got, grad_TE = run(ops, device, dtype, torch.arange(len(ROWS)), **options)
    probs_TE, map_TE = got.probs_TE.detach().cpu(), got.routing_map_TE.cpu()

    assert map_TE.sum(dim=1).eq(TOP_K).all()
    assert probs_TE[IS_NONFINITE_T].isnan().equal(map_TE[IS_NONFINITE_T])
    assert probs_TE[~map_TE].eq(0).all()
    assert probs_TE[IDS_T < 0].eq(0).all()
    assert probs_TE[~IS_NONFINITE_T].isfinite().all()
    for token in IS_NONFINITE_T.nonzero()[:, 0].tolist():
        is_in_pool_E = POOL_DE[IDS_T[token]]
        allowed, excluded = is_in_pool_E.nonzero()[:, 0], (~is_in_pool_E).nonzero()[:, 0]
        want = torch.cat([allowed, excluded])[:TOP_K].sort().values
        assert map_TE[token].nonzero()[:, 0].equal(want)

    is_left_out_T = IS_NONFINITE_T | (IDS_T < 0)
    assert got.z_T.detach().cpu()[is_left_out_T].eq(0).all()
    assert grad_TE.cpu()[is_left_out_T].eq(0).all()
    assert grad_TE.isfinite().all()
    assert got.num_tokens == (~is_left_out_T).sum()
    assert got.num_nonfinite == IS_NONFINITE_T.sum()

    # the others are routed as if such tokens were not there
    alone, alone_grad_TE = run(ops, device, dtype, (~is_left_out_T).nonzero()[:, 0], **options)
    counted_T = (~is_left_out_T).to(device)
    assert_equal("probs", got.probs_TE[counted_T], alone.probs_TE)
    assert_equal("map", got.routing_map_TE[counted_T], alone.routing_map_TE)
    assert_equal("z", got.z_T[counted_T], alone.z_T)
    assert_equal("tokens", got.tokens_per_expert_E, alone.tokens_per_expert_E)
    assert_equal("entropy", got.entropy_sum, alone.entropy_sum)
    assert_close("score sums", got.score_sums_E, alone.score_sums_E, rtol=1e-6)
    assert_equal("gradient", grad_TE[counted_T], alone_grad_TE)


@pytest.mark.parametrize("mask", ["logits", "selection"])
@pytest.mark.parametrize("variant", OPTIONS)
def test_the_compiled_ops_decide_as_the_reference(
    compiled: Compiled, variant: str, mask: str, dtype: torch.dtype
) -> None:
    rows = torch.arange(len(ROWS))
    options = {**OPTIONS[variant], "mask": mask, "top_k": TOP_K}
    want, want_grad_TE = run(reference, torch.device("cpu"), dtype, rows, **options)
    if "expert_bias_E" in options:
        options["expert_bias_E"] = options["expert_bias_E"].to(compiled.device)
    got, grad_TE = run(compiled.ops, compiled.device, dtype, rows, **options)
    rtol = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert_equal("map", got.routing_map_TE.cpu(), want.routing_map_TE)
    assert_equal("counts", got.counts_X[:-1].cpu(), want.counts_X[:-1])
    assert_close("z", got.z_T.cpu(), want.z_T)
    assert_close("probs", got.probs_TE.cpu().nan_to_num(7).float(), want.probs_TE.nan_to_num(7).float(), rtol=rtol)
    assert_close("gradient", grad_TE.cpu().float(), want_grad_TE.float(), rtol=rtol)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_such_tokens_add_nothing_to_a_document(
    implementation: Compiled, score_function: str, dtype: torch.dtype
) -> None:
    ops, device = implementation.ops, implementation.device

    def scores_of(rows: Tensor) -> Tensor:
        scores_DE: Tensor = ops.document_scores(
            logits_of(ROWS, dtype)[rows].to(device),
            document_ids_T=IDS_T[rows].to(device),
            num_documents=5,
            score_function=score_function,
        )
        return scores_DE.cpu()

    got_DE = scores_of(torch.arange(len(ROWS)))
    assert_equal("scores", got_DE, scores_of((~IS_NONFINITE_T).nonzero()[:, 0]))
    assert got_DE.sum(dim=1).gt(0).tolist() == [True, True, True, False, False]
    # sums that a block of warps joins before they leave it
    one_DE = ops.document_scores(
        logits_of(ROWS, dtype)[:5].to(device),
        document_ids_T=torch.zeros(5, dtype=torch.int64, device=device),
        num_documents=1,
        score_function=score_function,
    )
    assert_equal("one document", one_DE[0].cpu(), scores_of(torch.tensor([0]))[0])
