"""The benchmarks run, leave whole files, and refuse to time what does not compute what it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import pretraining
from support.benchmarking import BENCHMARKS, rows_of, run_benchmark

from emo_megatron import ops
from emo_megatron.ops.native import NativeOps

LAYER = (
    *("--quick", "--device", "cpu", "--tokens", "48", "--model-dim", "32", "--experts", "8"),
    *("--ffn-dim", "16", "--top-k", "2", "--documents", "3", "--seconds", "0.01"),
)
needs_native = pytest.mark.skipif(bool(ops.why_not_native("cpu")), reason="the compiled ops are not built")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[Path]]:
    """Runs the routing benchmark on tiny sizes and gives its files."""
    from bench_routing import Options, main

    options = Options(
        quick=True,
        device="cpu",
        threads=torch.get_num_threads(),
        tokens=(96,),
        experts=(16,),
        top_k=(2,),
        document_tokens=(12,),
        groups=4,
        group_topk=2,
        seconds=0.01,
        output=tmp_path / "results",
    )
    return lambda: main(options)


@needs_native
def test_routing_leaves_a_row_a_router_and_mode(routing: Callable[[], list[Path]]) -> None:
    table, page = routing()
    rows = rows_of(table)
    assert sorted(path.name for path in table.parent.iterdir()) == sorted([table.name, page.name])
    found = {(row["router"], row["mode"]): row for row in rows}
    assert len(found) == len(rows) == 12
    for (router, _), row in found.items():
        if router.startswith("Transformer Engine"):
            assert row["status"] == "needs a CUDA device"
            assert row["median_us"] == ""
        else:
            assert row["status"] == "measured"
            assert 0 < float(row["fastest_us"]) <= float(row["median_us"])
            assert int(row["rounds"]) >= 3
    assert found["native ops", "forward"]["times_native"] == "1.0"
    assert float(found["native ops with groups", "forward"]["times_native"]) > 0


def test_gpu_targets_are_judged_on_replays() -> None:
    from targets import NATIVE, STOCK, TARGETS, Result, verdicts
    from timing import Samples

    def result(tokens: int, *, stock: float) -> Result:
        found = next(t.shape for t in TARGETS["cuda"] if t.shape.num_tokens == tokens)
        samples = {
            name: Samples(forward=[1.0] * 3, total=[total] * 3) for name, total in {NATIVE: 1.0, STOCK: stock}.items()
        }
        # the host's time decides nothing
        eager = {name: Samples(forward=[9.0] * 3, total=[9.0] * 3) for name in samples}
        return Result(shape=found, samples=samples, eager=eager)

    results = [result(1024, stock=0.9), result(8192, stock=1.1), result(65536, stock=3.9)]
    lines = list(verdicts(results, device=torch.device("cuda"), threads=16))
    judged = sorted(re.match(r"(\w+): T=(\d+)", line).groups() for line in lines if not line.startswith("not judged"))
    assert judged == [("MISSED", "1024"), ("MISSED", "65536"), ("met", "65536"), ("met", "8192")]
    # the same sizes with short documents were not run, nor were the kernels alone
    assert len(lines) == 9


def test_the_floor_is_the_bytes_of_the_tensors() -> None:
    from routers import Shape, bytes_moved, kernel_bytes

    T, E, D = 96, 16, 4
    logits_TE = torch.randn(T, E, requires_grad=True)
    ids_T = torch.arange(T) // (T // D)
    scores_DE = ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=D)
    sizes_D = torch.full((D,), 5)
    pool_DE = ops.select_pool(scores_DE, pool_sizes_D=sizes_D)
    routing = ops.pool_topk(logits_TE, document_ids_T=ids_T, pool_DE=pool_DE, top_k=2)

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    probs_TE, map_TE, z_T = routing.probs_TE, routing.routing_map_TE, routing.z_T
    used_DW = ops.experts_used(map_TE, document_ids_T=ids_T, num_documents=D)
    assert kernel_bytes(num_tokens=T, num_experts=E, num_documents=D) == {
        "document_scores": size(logits_TE, ids_T, scores_DE),
        "select_pool": size(scores_DE, sizes_D, pool_DE),
        "pool_topk": size(logits_TE, ids_T, pool_DE, probs_TE, map_TE, z_T),
        "pool_topk backward": size(probs_TE, z_T, logits_TE, map_TE, ids_T, logits_TE),
        "experts_used": size(map_TE, ids_T, used_DW),
        "document_statistics": size(scores_DE, pool_DE, used_DW),
    }
    shape = Shape(num_tokens=T, num_experts=E, top_k=2, num_documents=D)
    backward = bytes_moved(shape, with_backward=True) - bytes_moved(shape, with_backward=False)
    assert backward == size(probs_TE, z_T, logits_TE, map_TE, ids_T, logits_TE)


def _break_weights(routing: ops.Routing, _: torch.Tensor) -> ops.Routing:
    return replace(routing, probs_TE=routing.probs_TE * 1.001)


def _break_choice(routing: ops.Routing, _: torch.Tensor) -> ops.Routing:
    return replace(routing, routing_map_TE=routing.routing_map_TE.roll(1, dims=0))


def _break_loss(routing: ops.Routing, _: torch.Tensor) -> ops.Routing:
    return replace(routing, z_T=routing.z_T * 1.01)


def _break_gradient(routing: ops.Routing, logits_TE: torch.Tensor) -> ops.Routing:
    nothing = 1e-3 * (logits_TE - logits_TE.detach())
    return replace(routing, probs_TE=routing.probs_TE + nothing)


@needs_native
@pytest.mark.parametrize(
    ("break_it", "says"),
    [(_break_weights, "weights"), (_break_choice, "experts"), (_break_loss, "losses"), (_break_gradient, "gradient")],
)
def test_routing_refuses_to_time_a_broken_op(
    routing: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    break_it: Callable[[ops.Routing, torch.Tensor], ops.Routing],
    says: str,
) -> None:
    real = NativeOps.pool_topk

    def broken(self: NativeOps, logits_TE: torch.Tensor, **options: Any) -> ops.Routing:
        return break_it(real(self, logits_TE, **options), logits_TE)

    monkeypatch.setattr(NativeOps, "pool_topk", broken)
    with pytest.raises(ValueError, match=f"native ops .*{says}"):
        routing()
    assert not (tmp_path / "results").exists()


@needs_native
def test_an_ended_run_keeps_the_sizes_it_has(
    routing: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import bench_routing
    from timing import Ended

    real = bench_routing._measure
    for finished in (0, 1):
        left = iter([True] * finished + [False])

        def measure(*arguments: Any, left: Any = left, **options: Any) -> Any:
            if not next(left):
                raise Ended
            return real(*arguments, **options)

        monkeypatch.setattr(bench_routing, "_measure", measure)
        shapes = list(bench_routing.Options(tokens=(96, 48), experts=(16,), top_k=(2,)).shapes())
        monkeypatch.setattr(bench_routing.Options, "shapes", lambda _, shapes=shapes: iter(shapes))
        if finished:
            table, page = routing()
            assert {row["tokens"] for row in rows_of(table)} == {"96"}
            assert "ended: after 1 of" in page.read_text()
        else:
            with pytest.raises(Ended):
                routing()
            assert not (tmp_path / "results").exists()


def test_layer_leaves_layers_routers_and_pieces(tmp_path: Path) -> None:
    done = run_benchmark("bench_layer", *LAYER, "--threads", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table, page = sorted(tmp_path.iterdir())
    assert [table.suffix, page.suffix] == [".csv", ".md"]
    rows = rows_of(table)
    assert {"layer", "router", "forward: pool_topk"} <= {row["part"] for row in rows}
    times = {
        (row["part"], row["expert_kind"], row["variant"]): float(row["times_stock"])
        for row in rows
        if row["times_stock"]
    }
    kinds = {("layer", "SequentialMLP"), ("layer", "torch.nn.functional.grouped_mm"), ("router", "")}
    assert {key[:2] for key in times} == kinds
    assert len(times) == 9
    assert all(times[*kind, "standard router"] == 1.0 for kind in kinds)


BREAK_ROUTING = """
import dataclasses
from emo_megatron import ops
real = ops.pool_topk
def broken(*args, **options):
    routing = real(*args, **options)
    return dataclasses.replace(routing, probs_TE=routing.probs_TE * 1.01)
ops.pool_topk = broken
"""


def test_layer_refuses_to_time_a_broken_router(tmp_path: Path) -> None:
    """What else it refuses: test_bench_layer.py."""
    done = run_benchmark("bench_layer", *LAYER, "--output", tmp_path, before=BREAK_ROUTING)
    assert done.returncode == 2, done.stderr[-2000:]
    assert re.search("pools of all experts .*output", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_verdict_needs_the_whole_interval() -> None:
    from timing import Estimate, estimate, judge, ratio

    found = Estimate(median=3.1, low=2.9, high=3.2)
    assert judge(found, at_least=2.5) == "met"
    assert judge(found, at_least=3.0) == "undecided"
    assert judge(found, at_least=3.5) == "MISSED"
    assert judge(found, at_most=3.0) == "undecided"
    assert judge(found, at_most=2.5) == "MISSED"
    # a disturbed round moves neither the median nor, alone, its interval far
    rounds = estimate([1.0] * 10 + [50.0])
    assert (rounds.median, rounds.low, rounds.high) == (1.0, 1.0, 1.0)
    # rounds are compared pair by pair: a slow machine slows both
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]).high == 2.0


@pytest.mark.slow
def test_dispatch_compares_two_dispatchers_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_dispatch import QUICK
    from dispatchers import uniform_routing

    small = ("--quick", "--tokens", "24", "--model-dim", "16", "--rounds", "2", "--ranks", "2")
    done = run_benchmark("bench_dispatch", *small, "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = tmp_path.glob("*.csv")
    rows = rows_of(table)
    assert len(rows) == 8
    rows_sent = {row["dispatcher"]: int(row["rows"]) for row in rows}
    assert rows_sent["Megatron alltoall"] == 4 * 24
    # rank 0's, whose seed is its rank
    size = replace(QUICK, tokens=24, model_dim=16)
    routing_TE = uniform_routing(size, generator=torch.Generator().manual_seed(0))
    wanted = int(routing_TE.view(24, 2, -1).any(-1).sum())
    assert rows_sent["dedup"] == wanted < 2 * 24


@needs_native
def test_permutation_is_compared_and_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench_permute

    options = bench_permute.Options(quick=True, device="cpu", threads=torch.get_num_threads(), output=tmp_path)
    sizes = [bench_permute.Size(tokens=40, experts=8, top_k=2, width=24, dtype=dtype) for dtype in bench_permute.DTYPES]
    monkeypatch.setattr(bench_permute.Options, "sizes", lambda _: iter(sizes))
    table, page = bench_permute.main(options)
    assert len(rows_of(table)) == 2 * 3 * 2
    assert page.is_file()

    monkeypatch.setattr(bench_permute.dispatch, "sum_rows", lambda rows, **_: rows[:40].clone())
    with pytest.raises(ValueError, match="output"):
        bench_permute.main(options)


def test_replay_counts_rows_and_bytes_of_a_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    import replay_routing
    from replay_routing import ALLTOALL, DEDUP, RUNS, _row

    monkeypatch.setattr(replay_routing, "MICRO_BATCH", 4)
    tokens = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1]]
    # the last token is no whole micro-batch
    routing = {"3": torch.tensor([*tokens, [1, 0, 0, 1]], dtype=torch.bool)}
    as_is, other = {3: (0, 1, 2, 3)}, {3: (0, 2, 1, 3)}
    stock = _row(RUNS[0], 2, ALLTOALL, as_is, routing, 16)
    assert stock.rows_per_token == 2
    assert stock.crossing_bytes == 2 * (16 * 2 + 4) / 2
    assert stock.pair_imbalance == stock.row_imbalance == 5 / 4
    once = _row(RUNS[0], 2, DEDUP, as_is, routing, 16)
    assert once.rows_per_token == 5 / 4
    assert once.crossing_bytes == (5 / 4 * 16 * 2 + 2 * 8) / 2
    assert once.pair_imbalance == 5 / 4
    assert once.row_imbalance == 3 / 2.5
    assert _row(RUNS[0], 2, DEDUP, other, routing, 16).rows_per_token == 7 / 4


@pytest.mark.slow
def test_replay_runs_models_of_a_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_prefix: Path) -> None:
    pytest.importorskip("matplotlib")
    import replay_routing
    from replay_routing import ALLTOALL, BEGIN, DEDUP, END, RUNS, Options, main

    runs, page = tmp_path / "demo", tmp_path / "page.md"
    flags = ("--pool-min", 3, "--train-iters", 1, "--save-interval", 1)
    pretraining.pretrain(1, *flags, "--save", runs / "emo" / "checkpoint", data=data_prefix)
    (runs / "standard").symlink_to("emo")
    (runs / "corpus" / "validation").mkdir(parents=True)
    save_file(
        {
            "tokens": torch.randint(1, 500, (400,), dtype=torch.int32),
            "cu_seqlens": torch.arange(0, 401, 50, dtype=torch.int32),
        },
        runs / "corpus" / "validation" / "text.safetensors",
    )
    page.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(replay_routing, "MICRO_BATCH", 64)
    # with pools and without
    monkeypatch.setattr(replay_routing, "RUNS", RUNS[:2])
    main(Options(runs=runs, ranks=(2,), tokens=400, output=tmp_path / "results", page=page))
    rows = rows_of(tmp_path / "results" / "traffic.csv")
    found = {(row["run"], row["dispatch"]): float(row["rows_per_token"]) for row in rows}
    assert len(found) == 8
    for run in RUNS[:2]:
        assert found[run.name, ALLTOALL] == 2
        assert 1 < found[run.name, DEDUP] < 2
    # pools change which experts tokens get
    assert found[RUNS[0].name, DEDUP] != found[RUNS[1].name, DEDUP]
    # of eight rows two, a heading of two lines and the marks
    assert len(page.read_text().splitlines()) == 6


def test_dispatch_is_judged_by_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from bench_dispatch import QUICK, SIZE, Answer, _verdict
    from dispatchers import DEDUP, STOCK
    from timing import Samples

    def verdict(*stock: float) -> str:
        times = {
            name: Samples(forward=[1.0] * len(total), total=total)
            for name, total in ((STOCK, list(stock)), (DEDUP, [1.0] * len(stock)))
        }
        return _verdict(Answer(ranks=2, samples={"whole step": times}, traffic={}), SIZE)

    assert verdict(1.5, 1.5, 1.5).startswith("met")
    assert verdict(1.0, 1.5, 1.5, 1.0, 1.5).startswith("undecided")
    assert verdict(1.0, 1.0, 1.0).startswith("MISSED")
    assert _verdict(Answer(ranks=2, samples={}, traffic={}), QUICK).startswith("not judged")
