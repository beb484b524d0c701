"""The routing ops against the paper authors' router and Megatron's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.routing import LENGTHS, Options, assert_close, assert_equal, random_logits, segment
from torch import Tensor

from emo_megatron import ops
from emo_megatron.documents import DocumentSegments
from emo_megatron.ops.reference import pool_topk

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "emo_router_reference.npz")


def golden_case(name: str) -> dict[str, Tensor]:
    prefix = name + "/"
    found = {key: GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}
    return {key.removeprefix(prefix): torch.from_numpy(np.array(v)) for key, v in found.items()}


def golden_segments(case: dict[str, Tensor]) -> DocumentSegments:
    """The documents of a case: ends are given for each row, from the row's own start."""
    num_rows, length = case["hidden"].shape[:2]
    row_D = torch.repeat_interleave(torch.arange(num_rows), case["documents_per_row"])
    ends = case["document_ends"] + row_D * length
    return DocumentSegments.from_cu_seqlens(
        torch.cat([torch.zeros(1, dtype=torch.int64), ends]), num_tokens=num_rows * length, tokens_per_sample=length
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", ["train_small", "eval_small", "train_release"])
def test_golden(name: str, backend: ops.Backend, device: torch.device) -> None:
    case = golden_case(name)
    num_experts, top_k, num_shared, *_, num_forced, is_training = case["config"].tolist()
    assert (num_shared, num_forced) == (1, 0)
    segments = golden_segments(case)
    ids_T, num_documents = segments.document_ids_T.to(device), segments.num_documents
    hidden_TH = case["hidden"].flatten(0, 1).to(device).requires_grad_()
    gate_EH = case["gate_weight"].to(device).requires_grad_()
    # the shared expert is the gate's last row: always on, weight 1, not routed
    logits_TE = hidden_TH @ gate_EH[:-1].T

    scores_DE = ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=num_documents, backend=backend)
    pool_DE = ops.select_pool(scores_DE, pool_sizes_D=case["pool_sizes"].to(device), backend=backend)
    routing = ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=top_k - 1, backend=backend)

    want_ids_TK = case["expert_indices"].flatten(0, 1)
    want_weights_TK = case["expert_weights"].flatten(0, 1)
    want_TE = torch.zeros(len(want_ids_TK), num_experts).scatter(1, want_ids_TK, want_weights_TK)
    assert want_ids_TK[:, -1].eq(num_experts - 1).all()
    assert_equal("routing_map", routing.routing_map_TE.cpu(), want_TE[:, :-1] > 0)
    assert_equal("tokens", routing.tokens_per_expert_E.cpu(), case["tokens_per_expert"][:-1])
    assert_close("probs", routing.probs_TE.cpu(), want_TE[:, :-1])

    upstream_TK = case["grad_expert_weights"].flatten(0, 1)
    upstream_TE = torch.zeros_like(want_TE).scatter(1, want_ids_TK, upstream_TK)[:, :-1]
    carried = (routing.probs_TE * upstream_TE.to(device)).sum()
    # the authors' router has no losses in evaluation
    if is_training:
        num_tokens = len(want_ids_TK)
        f_E = routing.tokens_per_expert_E / (num_tokens * (top_k - 1))
        lb_loss = (num_experts - 1) * (f_E @ routing.score_sums_E) / num_tokens
        z_loss = routing.z_T.square().mean()
        assert_close("lb_loss", lb_loss.double().cpu(), case["lb_loss"])
        assert_close("z_loss", z_loss.double().cpu(), case["z_loss"])
        carried = carried + 0.1 * lb_loss + 0.001 * z_loss
    carried.backward()
    assert_close("grad_hidden", hidden_TH.grad.cpu(), case["grad_hidden"].flatten(0, 1))
    assert_close("grad_gate_weight", gate_EH.grad.cpu(), case["grad_gate_weight"])


STOCK = {
    "softmax": Options(top_k=4),
    "softmax, one expert": Options(top_k=1),
    "softmax, scaled": Options(top_k=4, scaling_factor=2.5),
    "softmax after": Options(top_k=4, pre_softmax=False),
    "softmax after, scaled": Options(top_k=4, pre_softmax=False, scaling_factor=0.3),
    "sigmoid": Options(top_k=4, score_function="sigmoid"),
    "sigmoid, one expert": Options(top_k=1, score_function="sigmoid"),
    "sigmoid, biased": Options(top_k=4, score_function="sigmoid", expert_bias_E=torch.linspace(-0.3, 0.3, 127)),
    "sqrtsoftplus": Options(top_k=4, score_function="sqrtsoftplus"),
    "sqrtsoftplus, one expert": Options(top_k=1, score_function="sqrtsoftplus"),
    "sqrtsoftplus, biased": Options(
        top_k=4, score_function="sqrtsoftplus", expert_bias_E=torch.linspace(-0.3, 0.3, 127), scaling_factor=2.5
    ),
}


@pytest.mark.parametrize("num_experts", [8, 127])
@pytest.mark.parametrize("name", STOCK)
def test_a_pool_of_all_experts_is_megatron_bit_for_bit(name: str, num_experts: int) -> None:
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    options = STOCK[name]
    bias_E = None if options.expert_bias_E is None else options.expert_bias_E[:num_experts]
    options = replace(options, expert_bias_E=bias_E)
    ids_T = segment(LENGTHS).document_ids_T
    logits_TE = random_logits(len(ids_T), num_experts, seed=7)
    upstream_TE = random_logits(len(ids_T), num_experts, seed=8)

    wanted_TE = logits_TE.clone().requires_grad_()
    want_TE, want_map_TE = moe_utils.topk_routing_with_score_function(
        wanted_TE,
        topk=options.top_k,
        use_pre_softmax=options.pre_softmax,
        scaling_factor=options.scaling_factor,
        score_function=options.score_function,
        expert_bias=bias_E,
    )
    (want_TE * upstream_TE).sum().backward()
    _, want_scores_TE = moe_utils.compute_routing_scores_for_aux_loss(logits_TE, options.top_k, options.score_function)
    for pool_DE in (None, torch.ones(len(LENGTHS), num_experts, dtype=torch.bool)):
        routed_TE = logits_TE.clone().requires_grad_()
        got = pool_topk(routed_TE, document_ids_T=ids_T, pool_DE=pool_DE, **options.as_arguments())
        (got.probs_TE * upstream_TE).sum().backward()
        assert_equal("probs", got.probs_TE, want_TE)
        assert_equal("routing_map", got.routing_map_TE, want_map_TE)
        assert_equal("gradient", routed_TE.grad, wanted_TE.grad)
        assert_equal("score_sums", got.score_sums_E, want_scores_TE.sum(0))
