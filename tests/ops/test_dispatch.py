"""Layout, copies and sums: the reference against loops, the compiled ops against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.emulator import Compiled, host_ops, load_compiled
from support.routing import assert_equal
from torch import Tensor

from emo_megatron.ops import dispatch, native, reference_dispatch
from emo_megatron.ops.reference_dispatch import Fanout, ReceivePlan, SendPlan, fan_out


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens with up to `top_k` experts each."""

    tokens: int
    experts: int
    ranks: int
    top_k: int
    is_even: bool = True
    """False: a token has any number of experts from none on."""

    def routing_map(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        scores_TE = torch.rand(self.tokens, self.experts, generator=generator)
        chosen_TK = scores_TE.topk(self.top_k).indices
        if self.is_even:
            return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
        wanted_T1 = torch.randint(0, self.top_k + 1, (self.tokens, 1), generator=generator)
        return scores_TE.argsort(1).argsort(1) < wanted_T1


CASES = {
    "small": Case(tokens=7, experts=8, ranks=2, top_k=3),
    "top-1": Case(tokens=33, experts=16, ranks=4, top_k=1),
    "one rank": Case(tokens=5, experts=6, ranks=1, top_k=2),
    "an expert a rank": Case(tokens=9, experts=6, ranks=6, top_k=6),
    "no tokens": Case(tokens=0, experts=8, ranks=2, top_k=2),
    "one token": Case(tokens=1, experts=3, ranks=3, top_k=1),
    "nobody chosen": Case(tokens=40, experts=8, ranks=2, top_k=0),
    "tokens without experts": Case(tokens=200, experts=24, ranks=3, top_k=3, is_even=False),
    "many": Case(tokens=700, experts=40, ranks=4, top_k=8),
    "many on one rank": Case(tokens=650, experts=100, ranks=1, top_k=7),
    "thousands": Case(tokens=4200, experts=8, ranks=2, top_k=1),
    "widest": Case(tokens=70, experts=1024, ranks=1, top_k=32),
    "more ranks than lanes": Case(tokens=300, experts=80, ranks=40, top_k=5, is_even=False),
}


def plans(ops: Any, routing_map: Tensor, num_ranks: int) -> tuple[Tensor, SendPlan, ReceivePlan]:
    """All that is planned for one rank's tokens, as if it received them all itself."""
    counts = ops.count_sends(routing_map, num_ranks=num_ranks)
    num_rows, num_pairs = int(counts[:num_ranks].sum()), int(counts[num_ranks:].sum())
    send = ops.plan_send(routing_map, num_ranks=num_ranks, num_rows=num_rows, num_pairs=num_pairs)
    receive = ops.plan_receive(send.codes_P, num_rows=num_rows, num_experts=routing_map.shape[1] // num_ranks)
    return counts, send, receive


def tensors(counts: Tensor, send: SendPlan, receive: ReceivePlan) -> dict[str, Tensor]:
    """By name."""
    found = {"counts": counts, "places": send.places_P, "codes": send.codes_P}
    found["order"] = receive.order_P
    for name, fanout in (("rows", send.rows), ("pairs", receive.pairs)):
        for part in ("source_P", "copies_P", "bounds_N"):
            found[f"{name}.{part}"] = getattr(fanout, part)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_token_is_sent_to_a_rank_once(name: str) -> None:
    case, routing = CASES[name], CASES[name].routing_map()
    counts, send, receive = plans(reference_dispatch, routing, case.ranks)
    here = case.experts // case.ranks
    tokens, places, codes, rows = [], [], [], []
    for rank in range(case.ranks):
        rows.append(0)
        for token in range(case.tokens):
            experts = routing[token, rank * here : (rank + 1) * here].nonzero()[:, 0].tolist()
            tokens += [token] * bool(experts)
            rows[-1] += bool(experts)
            places += [token * case.experts + rank * here + expert for expert in experts]
            codes += [2 * expert + (i == 0) for i, expert in enumerate(experts)]
    assert counts.tolist() == [*rows, *routing.sum(0).tolist()]
    assert send.rows.source_P.tolist() == tokens
    assert send.places_P.tolist() == places
    assert send.codes_P.tolist() == codes

    row_of_pair = [sum(code & 1 for code in codes[: i + 1]) - 1 for i in range(len(codes))]
    by_expert = sorted(range(len(codes)), key=lambda i: (codes[i] >> 1, row_of_pair[i]))
    assert receive.order_P.tolist() == by_expert
    assert receive.pairs.source_P.tolist() == [row_of_pair[i] for i in by_expert]
    for fanout in (send.rows, receive.pairs):
        source, bounds = fanout.source_P.tolist(), fanout.bounds_N.tolist()
        for row, (begin, end) in enumerate(pairwise(bounds)):
            want = [copy for copy, its_row in enumerate(source) if its_row == row]
            assert fanout.copies_P[begin:end].tolist() == want


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", CASES)
def test_compiled_plans(compiled: Compiled, name: str) -> None:
    case, routing = CASES[name], CASES[name].routing_map()
    want = tensors(*plans(reference_dispatch, routing, case.ranks))
    got = tensors(*plans(compiled.ops, routing.to(compiled.device), case.ranks))
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        assert_equal(key, got[key].cpu(), value)


def test_pairs_of_several_senders(compiled: Compiled) -> None:
    """What a rank receives: the codes of one after the other; runs of pairs lie across the senders' borders."""
    routings = [Case(tokens=tokens, experts=24, ranks=1, top_k=5) for tokens in (117, 1, 90)]
    plans_of = [plans(reference_dispatch, case.routing_map(), 1) for case in routings]
    codes_P = torch.cat([send.codes_P for _, send, _ in plans_of])
    num_rows = sum(case.tokens for case in routings)
    want = reference_dispatch.plan_receive(codes_P, num_rows=num_rows, num_experts=24)
    got = compiled.ops.plan_receive(codes_P.to(compiled.device), num_rows=num_rows, num_experts=24)
    assert_equal("order", got.order_P.cpu(), want.order_P)
    for part in ("source_P", "copies_P", "bounds_N"):
        assert_equal(part, getattr(got.pairs, part).cpu(), getattr(want.pairs, part))


def assert_same_bits(name: str, got: Tensor, want: Tensor) -> None:
    """Equal with the signs of zeros."""
    assert got.dtype == want.dtype
    assert_equal(name, got.view(torch.uint8), want.view(torch.uint8))


def random_fanout(num_copies: int, num_rows: int) -> Fanout:
    generator = torch.Generator().manual_seed(1)
    source_P = torch.randint(0, num_rows, (num_copies,), generator=generator)
    # the second row has no copy
    return fan_out(source_P.masked_fill(source_P == 1, 0), num_sources=num_rows)


def to_device(fanout: Fanout, device: torch.device) -> Fanout:
    return Fanout(*(part.to(device) for part in fanout))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 40, 128, 300])
@pytest.mark.parametrize("offset", [0, 1])
def test_compiled_copies_and_sums(compiled: Compiled, dtype: torch.dtype, width: int, offset: int) -> None:
    fanout = random_fanout(60, 21)
    on_device = to_device(fanout, compiled.device)
    generator = torch.Generator().manual_seed(2)

    def numbers(rows: int) -> tuple[Tensor, Tensor]:
        """Beginning where a vector of sixteen bytes may not."""
        flat = (torch.randn(rows * width + offset, generator=generator) * 3).to(dtype)
        flat[offset + 1 :: 7] = -0.0
        on_device = flat.to(compiled.device)[offset:].view(rows, width)
        return flat[offset:].view(rows, width), on_device

    rows_NH, given_NH = numbers(21)
    want = reference_dispatch.copy_rows(rows_NH, fanout=fanout)
    got = compiled.ops.copy_rows(given_NH, fanout=on_device)
    assert_same_bits("copies", got.cpu(), want)
    copies_PH, given_PH = numbers(60)
    want = reference_dispatch.sum_rows(copies_PH, fanout=fanout)
    got = compiled.ops.sum_rows(given_PH, fanout=on_device)
    assert not want[1].any()
    assert_same_bits("sums", got.cpu(), want)


def test_nothing_to_copy_or_sum(compiled: Compiled) -> None:
    def nothing_of(num_rows: int) -> Fanout:
        no_copies = torch.empty(0, dtype=torch.int64)
        return to_device(fan_out(no_copies, num_sources=num_rows), compiled.device)

    rows_NH = torch.ones(4, 5, device=compiled.device)
    assert compiled.ops.copy_rows(rows_NH, fanout=nothing_of(4)).shape == (0, 5)
    assert compiled.ops.copy_rows(rows_NH[:0], fanout=nothing_of(0)).shape == (0, 5)
    sums_NH = compiled.ops.sum_rows(rows_NH[:0], fanout=nothing_of(3))
    assert_equal("sums", sums_NH.cpu(), torch.zeros(3, 5))
    assert compiled.ops.sum_rows(rows_NH[:0], fanout=nothing_of(0)).shape == (0, 5)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_copies_and_sums_are_each_others_gradients(backend: dispatch.Backend) -> None:
    fanout = random_fanout(17, 6)
    for function, rows in ((dispatch.copy_rows, 6), (dispatch.sum_rows, 17)):
        numbers = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, function=function: function(x, fanout=fanout, backend=backend), (numbers,)
        )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_low_precision_sums_are_rounded_once(backend: dispatch.Backend) -> None:
    copies = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    fanout = fan_out(torch.zeros(3, dtype=torch.int64), num_sources=1)
    assert dispatch.sum_rows(copies, fanout=fanout, backend=backend).item() == 258


@pytest.mark.parametrize("num_threads", [2, 5])
def test_the_same_for_any_number_of_threads(num_threads: int) -> None:
    case = CASES["many"]
    fanout = random_fanout(3000, 500)
    copies_PH = torch.randn(3000, 300, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, num_threads):
            torch.set_num_threads(threads)
            found.append(tensors(*plans(host_ops(), case.routing_map(), case.ranks)))
            found[-1]["sums"] = host_ops().sum_rows(copies_PH, fanout=fanout)
            found[-1]["copies"] = host_ops().copy_rows(copies_PH[:500], fanout=fanout)
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert_same_bits(name, found[1][name], value)


def test_the_same_for_any_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, case = load_compiled("cuda"), CASES["many"]
    want = tensors(*plans(ops, case.routing_map(), case.ranks))
    for seed in range(1, 5):
        monkeypatch.setenv("EMO_EMULATOR_SEED", str(seed))
        for name, value in tensors(*plans(ops, case.routing_map(), case.ranks)).items():
            assert_equal(name, value, want[name])


def test_operators_keep_the_rules_of_torch(compiled: Compiled) -> None:
    operators = getattr(torch.ops, compiled.ops.namespace)
    routing = CASES["small"].routing_map().to(compiled.device)
    _, send, receive = plans(compiled.ops, routing, 2)
    rows_NH = torch.randn(7, 4, device=compiled.device)
    rows = (send.rows.source_P, send.rows.copies_P, send.rows.bounds_N)
    copies_PH = compiled.ops.copy_rows(rows_NH, fanout=send.rows)
    num_rows, num_pairs = len(send.rows.source_P), len(send.codes_P)
    for operator, arguments in (
        (operators.count_sends, (routing, 2)),
        (operators.plan_send, (routing, 2, num_rows, num_pairs)),
        (operators.plan_receive, (send.codes_P, num_rows, 4)),
        (operators.copy_rows, (rows_NH, *rows)),
        (operators.sum_rows, (copies_PH, *rows[1:])),
    ):
        torch.library.opcheck(operator.default, arguments)
    assert len(receive.order_P) == num_pairs


def test_torch_compile_sees_through() -> None:
    fanout = random_fanout(17, 6)

    def step(rows_NH: Tensor) -> Tensor:
        copies_PH = dispatch.copy_rows(rows_NH * 2, fanout=fanout)
        return dispatch.sum_rows(copies_PH.tanh(), fanout=fanout).square().sum()

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        rows_NH = torch.linspace(-1, 1, 18).view(6, 3).requires_grad_()
        function(rows_NH).backward()
        grads.append(rows_NH.grad)
    assert_equal("gradient", grads[1], grads[0])


def test_what_cannot_be_is_named() -> None:
    ops, routing = native.load_native(), CASES["small"].routing_map()
    for implementation in (ops, reference_dispatch):
        with pytest.raises((RuntimeError, ValueError), match="got 8 experts, 3 ranks"):
            implementation.count_sends(routing, num_ranks=3)
    with pytest.raises(RuntimeError, match="must be those of count_sends; got 3 and 21"):
        ops.plan_send(routing, num_ranks=2, num_rows=3, num_pairs=21)
    codes_P = plans(ops, routing, 2)[1].codes_P
    with pytest.raises(RuntimeError, match="codes must name experts below 2"):
        ops.plan_receive(codes_P, num_rows=12, num_experts=2)
    with pytest.raises(RuntimeError, match="codes must begin 1 rows"):
        ops.plan_receive(codes_P & ~1, num_rows=1, num_experts=4)
    fanout = fan_out(torch.tensor([1, 0]), num_sources=2)
    for changed, message in (
        ({"source_P": torch.tensor([0, 2])}, r"sources must lie in \[0, 2\); got 2"),
        ({"source_P": torch.tensor([0, 1])}, "copy 1 is of row 1, but .* name it for row 0"),
        ({"source_P": fanout.source_P.int()}, "sources has the wrong dtype"),
        ({"copies_P": torch.tensor([1, 2])}, r"order must lie in \[0, 2\); got 2"),
        ({"copies_P": torch.tensor([1, 1])}, "copy 1 is of row 0, but .* name it for row 1"),
        ({"bounds_N": torch.tensor([0, 1, 3])}, r"bounds must lie in \[0, 3\); got 3"),
        ({"bounds_N": torch.tensor([0, 1, 1])}, "must name all 2 copies; they name 1"),
        ({"bounds_N": torch.tensor([0, 1])}, "bounds must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.copy_rows(torch.zeros(2, 3), fanout=fanout._replace(**changed))
    with pytest.raises(RuntimeError, match="rows must be float64"):
        ops.copy_rows(torch.zeros(2, 3, dtype=torch.int64), fanout=fanout)
    with pytest.raises(RuntimeError, match=r"order must lie in \[0, 2\); got -1"):
        ops.sum_rows(torch.zeros(2, 3), fanout=fanout._replace(copies_P=torch.tensor([0, -1])))


@pytest.mark.usefixtures("poisoned_memory")
def test_what_the_host_cannot_look_at_stays_inside(compiled: Compiled) -> None:
    """A CPU refuses these; a GPU copies zeros for indices beyond, adds nothing, and writes nothing beyond."""
    device = compiled.device
    # ones lie before and after, so what is read from there shows
    rows_NH = torch.ones(30, 8, device=device)[10:13]
    fanout = Fanout(
        source_P=torch.tensor([0, 3, -1, 1, 2], device=device),
        copies_P=torch.tensor([0, 9, -2, 3, -1], device=device),
        bounds_N=torch.tensor([-5, 3, 99, 2**60], device=device),
    )
    if compiled.is_checked:
        with pytest.raises(RuntimeError, match=r"sources must lie in \[0, 3\); got 3"):
            compiled.ops.copy_rows(rows_NH, fanout=fanout)
        return
    copies_PH = compiled.ops.copy_rows(rows_NH, fanout=fanout)
    assert copies_PH[:4, 0].tolist() == [1, 0, 0, 1]
    # the last one is named by no row, so nobody writes it
    assert copies_PH[4].isnan().all()
    of_no_row = fanout._replace(bounds_N=fanout.bounds_N[:1])
    assert not compiled.ops.copy_rows(rows_NH[:0], fanout=of_no_row).any()
    sums_NH = compiled.ops.sum_rows(torch.ones(30, 8, device=device)[10:15], fanout=fanout)
    assert sums_NH[:, 0].tolist() == [1, 1, 0]

    routing = CASES["small"].routing_map().to(device)
    # of nothing there is nothing to write to
    nothing = compiled.ops.plan_send(routing, num_ranks=2, num_rows=0, num_pairs=0)
    assert nothing.rows.bounds_N.shape == (8,)
    codes_P = torch.tensor([1, 2, 40, -3, 3], dtype=torch.int32, device=device)
    received = compiled.ops.plan_receive(codes_P, num_rows=2, num_experts=2)
    assert received.order_P[:3].tolist() == [0, 1, 4]
    none = compiled.ops.plan_receive(codes_P, num_rows=0, num_experts=2)
    assert none.pairs.bounds_N.shape == (1,)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["small", "many", "no tokens", "nobody chosen"])
def test_sizes_that_are_too_large_leave_nothing_unwritten(compiled: Compiled, name: str) -> None:
    """A CPU refuses them; elsewhere places and codes beyond what there is are 0, so that a gather stays inside."""
    case, routing = CASES[name], CASES[name].routing_map()
    _, want, _ = plans(reference_dispatch, routing, case.ranks)
    num_rows, num_pairs = len(want.rows.source_P), len(want.codes_P)
    sizes = {"num_ranks": case.ranks, "num_rows": num_rows + 40, "num_pairs": num_pairs + 70}
    implementations: list[tuple[Any, torch.device]] = [(reference_dispatch, torch.device("cpu"))]
    if compiled.is_checked:
        with pytest.raises(RuntimeError, match="must be those of count_sends"):
            compiled.ops.plan_send(routing, **sizes)
    else:
        implementations.append((compiled.ops, compiled.device))
    for ops, device in implementations:
        got = ops.plan_send(routing.to(device), **sizes)
        for part, wanted in ((got.places_P, want.places_P), (got.codes_P, want.codes_P)):
            assert_equal("written", part[:num_pairs].cpu(), wanted)
            assert not part[num_pairs:].any()
    if not compiled.is_checked:
        # rows that nobody sends are copied as zeros
        rows_TH = torch.ones(case.tokens, 4, device=compiled.device)
        copies_PH = compiled.ops.copy_rows(rows_TH, fanout=got.rows)
        assert copies_PH[:num_rows].eq(1).all()
        assert not copies_PH[num_rows:].any()


def test_backends_mix() -> None:
    routing = CASES["small"].routing_map()
    rows_TH = torch.randn(7, 4)
    native_plan, plan = (plans(ops, routing, 2)[1] for ops in (host_ops(), reference_dispatch))
    for backend, rows in (("native", plan.rows), ("reference", native_plan.rows)):
        copies = dispatch.copy_rows(rows_TH, fanout=rows, backend=backend)
        assert_equal("copies", copies, rows_TH[plan.rows.source_P])
        dispatch.sum_rows(copies, fanout=rows, backend=backend)
    # what the compiled ops do not take goes to the reference
    assert dispatch.copy_rows(rows_TH.long(), fanout=native_plan.rows).dtype == torch.int64


def test_one_graph_serves_every_size() -> None:
    ops, graphs = host_ops(), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def step(rows_NH: Tensor, source_P: Tensor, copies_P: Tensor, bounds_N: Tensor) -> Tensor:
        fanout = Fanout(source_P=source_P, copies_P=copies_P, bounds_N=bounds_N)
        return ops.copy_rows(rows_NH, fanout=fanout) * 2

    for copies in (3, 5, 8):
        fanout = fan_out(torch.arange(copies) % 4, num_sources=4)
        step(torch.ones(4, 6), fanout.source_P, fanout.copies_P, fanout.bounds_N)
    assert len(graphs) == 1


@pytest.mark.gpu
def test_gpu_graphs() -> None:
    """Nothing waits for the device: all of it can be captured."""
    ops, case = native.load_native(), CASES["many"]
    routing = case.routing_map().cuda()
    counts, send, _ = plans(ops, routing, case.ranks)
    num_rows = len(send.rows.source_P)
    num_pairs = int(counts[case.ranks :].sum())
    rows_NH = torch.randn(case.tokens, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            again = ops.plan_send(routing, num_ranks=case.ranks, num_rows=num_rows, num_pairs=num_pairs)
            ops.plan_receive(again.codes_P, num_rows=num_rows, num_experts=10)
            copies = ops.copy_rows(rows_NH, fanout=again.rows)
            sums = ops.sum_rows(copies, fanout=again.rows)
        graph.replay()
    torch.cuda.synchronize()
    assert_equal("codes", again.codes_P, send.codes_P)
    times_T1 = (routing.view(case.tokens, case.ranks, -1).any(-1)).sum(1, keepdim=True)
    torch.testing.assert_close(sums, rows_NH * times_T1)
