"""The benchmark of whole models: what it writes, what it counts, and that it times nothing that differs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from itertools import pairwise

import pytest
import torch
from support.benchmarking import BENCHMARKS, answer_of, rows_of, run_benchmark

TINY = (
    *("--quick", "--device", "cpu", "--threads", "1", "--layers", "1", "--model-dim", "32"),
    *("--experts", "4", "--ffn-dim", "16", "--vocab", "64", "--seq-length", "32", "--document-tokens", "8"),
)
GPU_NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_it_leaves_a_row_a_contender(tmp_path):
    done = run_benchmark("bench_model", *TINY, "--seconds", "0.01", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table, page = sorted(tmp_path.iterdir())
    assert table.name.startswith("model-")
    assert table.name.endswith("-quick.csv")
    rows = {row["contender"]: row for row in rows_of(table)}
    assert len(rows) == 5
    assert sum("metrics off" in name for name in rows) == 2
    assert rows["standard MoE"]["times_standard"] == "1.0"
    for row in rows.values():
        assert float(row["times_standard_low"]) <= float(row["times_standard_high"])
        # times of a CPU say nothing about training
        assert row["step_ms"] == row["tokens_per_second"] == row["mfu"] == ""
        assert row["peak_allocated_bytes"] == row["peak_reserved_bytes"] == ""
    assert page.suffix == ".md"


@pytest.mark.slow
def test_a_trace_is_of_the_standard_model_and_of_emo(tmp_path):
    traces = tmp_path / "traces"
    done = run_benchmark("bench_model", *TINY, "--dispatcher", "dedup", "--trace", traces)
    assert done.returncode == 0, done.stderr[-3000:]
    written = sorted(path.name for path in traces.iterdir())
    assert [name.split("-trace", 1)[1] for name in written] == [*("-emo.json.gz", "-standard.json.gz", ".csv", ".md")]
    assert all(name.startswith("model-dedup-") for name in written)
    found = {}
    for path in traces.glob("*.json.gz"):
        with gzip.open(path, "rt") as file:
            trace = json.load(file)
        assert "host_name" not in trace
        found[path.name.split("-")[-1]] = {event["name"] for event in trace["traceEvents"]}
    assert any("pool_topk" in name for name in found["emo.json.gz"])
    assert not any("pool_topk" in name for name in found["standard.json.gz"])
    rows = rows_of(next(traces.glob("*.csv")))
    assert {row["contender"] for row in rows} == {*("standard MoE", "EMO, pools of top-k to all experts")}
    assert all(int(row["count"]) > 0 and row["device_us"] == "" for row in rows)
    assert [row["operation"] for row in rows].count("all") == 2


def test_a_broken_router_is_refused(tmp_path):
    broken = """
import dataclasses
from emo_megatron import ops
real = ops.pool_topk
def wrong(*args, **options):
    routing = real(*args, **options)
    return dataclasses.replace(routing, probs_TE=routing.probs_TE * 1.001)
ops.pool_topk = wrong
"""
    done = run_benchmark("bench_model", *TINY, "--output", tmp_path / "results", before=broken)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search("layer 1.*weights", done.stderr)
    assert not (tmp_path / "results").exists()


GATE = """
import dataclasses
from unittest import mock
import torch
from bench_model import QUICK
from model_check import check_models
from models import ALL_EXPERTS, EMO, build_training
from emo_megatron import ops
from emo_megatron.mcore.layer import PoolMoELayer

training = build_training(QUICK, device=torch.device("cpu"), dispatcher="megatron")
real_topk, real_forward = ops.pool_topk, PoolMoELayer.forward

def choose_others(logits_TE, **options):
    routing = real_topk(logits_TE, **options)
    return dataclasses.replace(routing, routing_map_TE=routing.routing_map_TE.roll(1, dims=1))

def forget_pools(logits_TE, *, pool_DE, **options):
    return real_topk(logits_TE, pool_DE=torch.ones_like(pool_DE), **options)

def scale_gradient(self, hidden, *args, **options):
    output, bias = real_forward(self, hidden, *args, **options)
    return output + 0.1 * (output - output.detach()), bias

def scale_output(self, hidden, *args, **options):
    output, bias = real_forward(self, hidden, *args, **options)
    return 50 * output, bias

def verdict(owner, name, broken):
    with mock.patch.object(owner, name, broken):
        try:
            check_models(training)
        except ValueError as error:
            return str(error)
    return ""

answer({
    "as it is": verdict(ops, "pool_topk", real_topk),
    "choices": verdict(ops, "pool_topk", choose_others),
    "pools": verdict(ops, "pool_topk", forget_pools),
    "gradient": verdict(PoolMoELayer, "forward", scale_gradient),
    "output": verdict(PoolMoELayer, "forward", scale_output),
})
"""


def test_the_gate_names_what_differs():
    found = answer_of(GATE)
    assert found["as it is"] == ""
    assert re.search("layer 1.*experts", found["choices"])
    assert re.search("pool.*layer 1", found["pools"])
    assert "gradient of module.decoder.layers" in found["gradient"]
    assert "loss" in found["output"]


def _small_batch(**changes):
    from bench_model import QUICK
    from models import _batch

    size = dataclasses.replace(QUICK, **changes)
    return size, _batch(size, torch.device("cpu"), 0)


def test_documents_of_a_batch_fill_its_rows():
    size, batch = _small_batch(rows=3, seq_length=32, document_tokens=8)
    bounds = batch.bounds.tolist()
    assert bounds == sorted(set(bounds))
    assert len(bounds) == 3 * 4 + 1
    assert {0, 32, 64, 96} <= set(bounds)
    assert batch.longest == max(b - a for a, b in pairwise(bounds))
    assert size.tokens == batch.tokens["labels"].numel() == 96
    positions = batch.tokens["position_ids"][0].tolist()
    assert positions == [i for a, b in pairwise(bounds) for i in range(b - a)]


def test_operations_of_a_step_are_those_counted_by_torch():
    from model_cost import step_flops
    from torch.utils.flop_counter import FlopCounterMode

    size, batch = _small_batch(document_tokens=64)
    width, tokens = size.model_dim, size.tokens
    hidden = torch.ones(tokens, width, requires_grad=True)
    weights = [(width, 4 * width), *[(width, 3 * size.ffn_dim)] * (size.top_k + 1)]
    weights.append((width, size.experts))
    with FlopCounterMode(display=False) as counter:
        for _ in range(size.layers):
            for rows, columns in weights:
                (hidden @ torch.ones(rows, columns, requires_grad=True)).sum().backward()
            query = hidden.view(size.rows, size.seq_length, width)
            scores = query @ query.transpose(1, 2)
            (scores @ query).sum().backward()
        (hidden @ torch.ones(width, size.vocab, requires_grad=True)).sum().backward()
    # torch counts all pairs of a document, of which causal attention needs half
    attention = size.layers * 6 * 2 * width * size.rows * size.seq_length**2
    assert step_flops(size, batch) == counter.get_total_flops() - attention // 2


@pytest.mark.parametrize(("gpu", "mfu"), [(GPU_NAME, "0.5"), ("Some GPU", "")])
def test_a_gpus_rows_have_times_and_memory(gpu, mfu):
    from bench_model import QUICK, _rows
    from models import EMO, METRICS_OFF, STANDARD
    from timing import Samples

    seconds = {STANDARD: 0.5, STANDARD + METRICS_OFF: 0.25, EMO: 1.0, EMO + METRICS_OFF: 0.75}
    samples = {name: Samples(forward=[value / 4] * 3, total=[value] * 3) for name, value in seconds.items()}
    memory = dict.fromkeys(samples, (2 * 10**9, 3 * 10**9))
    flops = 989 * 10**12 // 4
    rows = list(_rows(samples, memory, QUICK, dispatcher="megatron", gpu_name=gpu, flops=flops))
    found = {row["contender"]: row for row in rows}
    assert found[EMO]["times_standard"] == 2.0
    assert found[EMO + METRICS_OFF]["times_standard"] == 3.0
    assert found[STANDARD]["step_ms"] == 500
    assert found[STANDARD]["forward_ms"] == 125
    assert found[STANDARD]["tokens_per_second"] == 256
    assert str(found[STANDARD]["mfu"]) == mfu
    assert found[EMO]["peak_reserved_bytes"] == 3 * 10**9


def test_gaps_lie_where_nothing_runs():
    from traces import Operation, gaps_of

    times = [(0, 10), (2, 5), (8, 12), (15, 16), (20, 30)]
    found = gaps_of([Operation(name="k", start_us=a, end_us=b) for a, b in times])
    assert (found.count, found.total_us, found.longest_us, found.span_us) == (2, 7, 4, 30)


def test_operations_are_kernels_on_a_gpu_and_leaves_on_a_cpu():
    from traces import _operations, most_of

    events = [
        {"ph": "X", "cat": "cpu_op", "name": "outer", "ts": 0, "dur": 10},
        {"ph": "X", "cat": "cpu_op", "name": "inner", "ts": 1, "dur": 2},
        {"ph": "X", "cat": "cpu_op", "name": "inner", "ts": 4, "dur": 2},
        {"ph": "X", "cat": "kernel", "name": "long", "ts": 9, "dur": 9},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 5, "dur": 1},
        {"ph": "X", "cat": "gpu_memcpy", "name": "copy", "ts": 7, "dur": 1},
        {"ph": "M", "name": "thread_name"},
    ]
    on_cpu = list(_operations(events, on_gpu=False))
    assert [operation.name for operation in on_cpu] == ["inner", "inner"]
    on_gpu = list(_operations(events, on_gpu=True))
    assert most_of(on_gpu, on_gpu=True) == [("long", 1, 9), ("copy", 2, 2)]
    assert most_of(on_gpu, on_gpu=False)[0] == ("copy", 2, 2)


@pytest.mark.parametrize("changes", [{"top_k": 8}, {"heads": 5}, {"rows": 0}, {"document_tokens": 65}])
def test_sizes_that_cannot_be_are_refused(changes):
    from bench_model import QUICK, Options

    with pytest.raises(ValueError, match=f"--{next(iter(changes)).replace('_', '-')}|--model-dim"):
        Options(**changes).size(QUICK)


def test_rows_that_do_not_fit_are_halved(monkeypatch):
    import bench_model
    from models import Training, batches_of

    def check(training):
        if training.batches[0].tokens["labels"].numel() > fits:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(bench_model, "check_models", check)
    size, cpu = dataclasses.replace(bench_model.QUICK, rows=7), torch.device("cpu")
    whole = Training(
        models={}, trackers={}, distributed=None, optimizer=None, batches=batches_of(size, cpu), num_layers=1
    )
    fits = 3 * size.seq_length
    training, found = bench_model._checked(whole, size, cpu)
    assert found == dataclasses.replace(size, rows=3)
    assert {batch.tokens["labels"].numel() for batch in training.batches} == {fits}
    fits = 1
    with pytest.raises(torch.OutOfMemoryError):
        bench_model._checked(whole, size, cpu)


@pytest.mark.parametrize(
    ("name", "tflops"), [(GPU_NAME, 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("Some GPU", None)]
)
def test_the_peak_of_a_gpu_is_known_or_left_out(name, tflops):
    from model_cost import peak_flops

    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
