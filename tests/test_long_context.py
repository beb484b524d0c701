"""examples/pretrain_emo.py under context parallelism, and with multi-token prediction: the run of one process."""

from __future__ import annotations

import pytest
from support.recorded_runs import differences, run

MARGIN = 1e-6
"""Smallest gap in probability a decision may be made by: a closer one could flip with the order of a sum."""
SAMPLES, SEQ, LAYERS = 32, 64, (2, 3, 4)
CP2 = ["--context-parallel-size", 2]
PP2 = ["--pipeline-model-parallel-size", 2]
VPP2 = [*PP2, "--num-virtual-stages-per-pipeline-rank", 2]
SP2 = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
# a global batch of the same samples: half of them for each rank
EP2 = ["--expert-model-parallel-size", 2, "--micro-batch-size", 1]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
FULL += ["--recompute-num-layers", 1]
MTP = ["--mtp-num-layers", 2, "--mtp-loss-scaling-factor", 0.3, "--mtp-exact-loss"]
# one layer for two depths, which counts its calls in evaluation too
ONE_MTP = [*MTP, "--mtp-use-repeated-layer"]
VALIDATION = ["--split", "50,50,0", "--eval-iters", 1, "--eval-interval", 2, "--seed", 8]
# Megatron's rotary embedding under context parallelism pins memory, which a CPU has not, and it predicts further with
# rotary positions or none
ROUTERS = ["--pool-documents", "routers", "--position-embedding-type", "none"]


@pytest.fixture(scope="module")
def single(data_prefix, tmp_path_factory):
    """The run of one process with these flags, done once."""
    found = {}

    def get(*flags):
        if flags not in found:
            folder = tmp_path_factory.mktemp("single") / "decisions"
            found[flags] = run(1, *flags, data=data_prefix, folder=folder)
        return found[flags]

    return get


@pytest.mark.parametrize(
    ("processes", "model", "layout"),
    [
        pytest.param(2, [], CP2, id="CP2"),
        *(
            pytest.param(processes, model, layout, id=name, marks=pytest.mark.slow)
            for name, processes, model, layout in [
                ("CP2, full recompute, tokens", 2, ["--calculate-per-token-loss"], [*CP2, *FULL]),
                ("CP2, one length", 2, [], [*CP2, "--max-documents", 24]),
                ("CP4", 4, [], ["--context-parallel-size", 4]),
                ("CP2 x PP2", 4, [], [*CP2, *PP2, *FULL]),
                ("CP2 x PP2 x VPP2", 4, [], [*CP2, *VPP2]),
                ("CP2 x TP2 + SP", 4, [], [*CP2, *SP2]),
                ("CP2 x EP2 x DP2", 4, [], [*CP2, *EP2]),
                ("CP2 x EP2 x DP2, dedup", 4, [], [*CP2, *EP2, "--pool-dispatcher", "dedup"]),
                ("CP2, prediction", 2, MTP, CP2),
                ("CP2 x PP2, prediction", 4, MTP, [*CP2, *PP2]),
                ("CP2, prediction and validation", 2, [*ONE_MTP, *VALIDATION], CP2),
                ("CP2 by sample", 2, ROUTERS, CP2),
                ("CP2 by sample, prediction", 2, [*ROUTERS, *MTP], CP2),
            ]
        ),
    ],
)
def test_a_layout_trains_the_run_of_one_process(processes, model, layout, data_prefix, tmp_path, single):
    want = single(*model)
    assert want["margin"] > MARGIN
    assert len(want["losses"]) == 4
    for layer in LAYERS:
        assert len(want["decisions"][layer, "experts"]) == SAMPLES * SEQ
    assert len(want["validation losses"]) == 3 * ("--eval-iters" in model)
    got = run(processes, *model, *layout, data=data_prefix, folder=tmp_path / "decisions")
    assert differences(got, want) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "seen"),
    [("labels are shifted", "losses"), ("samples are cut", "decisions"), ("means of ranks are averaged", "decisions")],
)
def test_a_planted_bug_is_seen(bug, seen, data_prefix, tmp_path, single):
    got = run(2, *CP2, "--bug", bug, data=data_prefix, folder=tmp_path / "decisions")
    assert seen in differences(got, single())
