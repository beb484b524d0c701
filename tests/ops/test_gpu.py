"""What only a GPU shows: streams, devices, a first call inside a capture, and code that inductor makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support.routing import assert_equal, random_logits
from torch import Tensor

from emo_megatron import ops
from emo_megatron.ops import dispatch

pytestmark = pytest.mark.gpu

NUM_TOKENS, NUM_EXPERTS, NUM_DOCUMENTS, TOP_K = 500, 128, 5, 8


def inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_T = torch.randint(-1, NUM_DOCUMENTS, (NUM_TOKENS,), generator=generator)
    return {
        "logits_TE": random_logits(NUM_TOKENS, NUM_EXPERTS).to(device),
        "ids_T": ids_T.sort().values.to(device),
        "positions_D": torch.arange(NUM_DOCUMENTS).to(device),
        "upstream_TE": random_logits(NUM_TOKENS, NUM_EXPERTS, seed=2).to(device),
    }


def every_op(logits_TE: Tensor, ids_T: Tensor, positions_D: Tensor, upstream_TE: Tensor) -> list[Tensor]:
    """All ops, forward and backward; nothing in it waits for the device."""
    logits_TE = logits_TE.detach().requires_grad_()
    documents = {"document_ids_T": ids_T, "num_documents": NUM_DOCUMENTS}
    scores_DE = ops.document_scores(logits_TE, **documents, backend="native")
    sizes_LD = ops.draw_pool_sizes(
        positions_D,
        offsets_D=positions_D,
        layer_number=range(1, 4),
        seed=1,
        low=20,
        high=90,
        num_experts=NUM_EXPERTS,
        backend="native",
    )
    pool_DE = ops.select_pool(scores_DE, pool_sizes_D=sizes_LD[1], backend="native")
    routed = ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=TOP_K, backend="native")
    in_groups = ops.pool_topk(
        logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=TOP_K, num_groups=8, group_topk=4, backend="native"
    )
    used_DW = ops.experts_used(routed.routing_map_TE, **documents, backend="native")
    statistics = ops.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW, backend="native")
    plan = dispatch.plan_send(
        routed.routing_map_TE, num_ranks=1, num_rows=NUM_TOKENS, num_pairs=NUM_TOKENS * TOP_K, backend="native"
    )
    pairs = dispatch.plan_receive(plan.codes_P, num_rows=NUM_TOKENS, num_experts=NUM_EXPERTS, backend="native").pairs
    copies_PH = dispatch.copy_rows(routed.probs_TE, fanout=pairs, backend="native")
    sums_NH = dispatch.sum_rows(copies_PH * 2, fanout=pairs, backend="native")
    loss = (sums_NH * upstream_TE).sum() + routed.score_sums_E.square().sum() + routed.z_T.sum()
    gates = {"score_function": "sqrtsoftplus", "backend": "native"}
    gates_DE = ops.document_scores(logits_TE, **documents, **gates)
    apart = ops.pool_topk(logits_TE, **documents, pool_DE=pool_DE, top_k=TOP_K, **gates)
    loss = loss + apart.score_sums_RE.square().sum() + (apart.probs_TE * upstream_TE).sum()
    (grad_TE,) = torch.autograd.grad([loss], [logits_TE])
    outputs = [scores_DE, sizes_LD, pool_DE, routed.probs_TE, routed.counts_X, used_DW, statistics]
    outputs += [gates_DE, apart.probs_TE, apart.score_sums_RE, apart.document_choices_DE]
    outputs += [in_groups.probs_TE, in_groups.counts_X, copies_PH]
    return [*(output.detach() for output in outputs), grad_TE]


def assert_all_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for index, (value, wanted) in enumerate(zip(got, want, strict=True)):
        assert_equal(f"output {index}", value.cpu(), wanted.cpu())


def captured(function: Callable[..., list[Tensor]], device: torch.device) -> list[Tensor]:
    """What one replay of a graph of the function's first call gives."""
    arguments = inputs(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(**arguments)
    for output in outputs:
        output.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


def first_call_in_a_capture() -> None:
    device = torch.device("cuda")
    # torch's own first time, a thread for gradients for instance, is not what is asked
    leaf = torch.ones(8, device=device, requires_grad=True)
    torch.autograd.grad(leaf.square().sum(), leaf)
    got = captured(every_op, device)
    assert_all_equal(got, every_op(**inputs(device)))


def test_the_first_call_of_a_process_may_lie_inside_a_capture() -> None:
    """Kernels are loaded when they are first called; here that is while a graph is captured."""
    program = f"import sys; sys.path[:0] = {sys.path!r}\n"
    program += "from ops.test_gpu import first_call_in_a_capture; first_call_in_a_capture()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernels_run_on_the_current_stream() -> None:
    """Input that another stream is about to write shows a kernel that does not wait for it."""
    device = torch.device("cuda")
    arguments = inputs(device)
    want = every_op(**arguments)
    late = {name: torch.zeros_like(tensor) for name, tensor in arguments.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for name, tensor in arguments.items():
            late[name].copy_(tensor)
        got = every_op(**late)
    stream.synchronize()
    assert_all_equal(got, want)


def test_kernels_run_on_the_device_of_their_tensors() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    want = every_op(**inputs(torch.device("cuda", 0)))
    with torch.cuda.device(0):
        assert_all_equal(every_op(**inputs(last)), want)
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(last):
        assert_all_equal(every_op(**inputs(last)), want)
        assert torch.cuda.current_device() == last.index


def test_inductor_compiles_around_the_ops() -> None:
    def step(logits_TE: Tensor, ids_T: Tensor, sizes_D: Tensor) -> Tensor:
        documents = {"document_ids_T": ids_T, "num_documents": NUM_DOCUMENTS}
        scores_DE = ops.document_scores(logits_TE, **documents)
        pool_DE = ops.select_pool(scores_DE, pool_sizes_D=sizes_D)
        routed = ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=TOP_K)
        used_DW = ops.experts_used(routed.routing_map_TE, **documents)
        statistics = ops.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=used_DW)
        apart = ops.pool_topk(logits_TE, **documents, pool_DE=pool_DE, top_k=TOP_K, score_function="sqrtsoftplus")
        loss = routed.probs_TE.square().sum() + routed.z_T.sum() + routed.score_sums_E.max()
        loss = loss + (apart.score_sums_RE * apart.document_choices_DE).square().sum()
        return loss + statistics.sum() * 0 + routed.counts_X.sum() * 0

    arguments = inputs(torch.device("cuda"))
    sizes_D = arguments["positions_D"] * 9 + 20
    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        logits_TE = arguments["logits_TE"].clone().requires_grad_()
        function(logits_TE, arguments["ids_T"], sizes_D).backward()
        grads.append(logits_TE.grad)
    torch.testing.assert_close(grads[1], grads[0])
