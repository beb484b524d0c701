"""Bridge's pretrain() under every layout gives the run of one process: losses, gradient norms, pools, experts."""

import json

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")
PARALLEL = {
    name: f"model.{flag}_parallel_size="
    for name, flag in {
        "ep": "expert_model",
        "pp": "pipeline_model",
        "vpp": "virtual_pipeline_model",
        "tp": "tensor_model",
        "cp": "context",
    }.items()
}
LAYOUTS = {
    "pp2 ep2": (4, {"pp": 2, "ep": 2}, ()),
    "pp4": (4, {"pp": 4}, ()),
    # in one batch, messages both ways between two stages would be mixed up over gloo
    "vpp2": (2, {"pp": 2, "vpp": 2}, ("model.overlap_p2p_comm=true", "model.batch_p2p_comm=false")),
    "tp2": (2, {"tp": 2}, ("model.sequence_parallel=true",)),
    "cp2": (2, {"cp": 2}, ()),
    "distributed optimizer": (
        2,
        {"ep": 2},
        ("optimizer.use_distributed_optimizer=true", "ddp.use_distributed_optimizer=true"),
    ),
    # between the stages of a pipeline, other micro-batches come before a backward
    "recompute moe": (
        2,
        {"pp": 2},
        ("model.recompute_granularity=selective", "model.recompute_modules=[moe]"),
    ),
    "recompute full": (
        2,
        {"pp": 2},
        (
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
        ),
    ),
}
SAME = 1e-6
"""Relative: sums in another order."""


def _run(name, folder, *, ranks=1, sizes=None, overrides=(), **options):
    parallel = [PARALLEL[axis] + str(size) for axis, size in (sizes or {}).items()]
    return {
        "name": name,
        "folder": str(folder / name.replace(" ", "_")),
        "load": str(folder / "start"),
        "ranks": ranks,
        "overrides": [*parallel, *overrides],
        **options,
    }


def _train(run_bridge, folder, runs):
    start = {"name": "start", "folder": str(folder / "start"), "steps": 1}
    file = folder / "runs.json"
    file.write_text(json.dumps([start, *runs]))
    run_bridge("-m", "support.bridge_run", file)
    return json.loads(file.with_suffix(".results.json").read_text())


def _require_same(found, wanted):
    for run in (wanted, found):
        assert not any(run["codes"]), run["printed"][-4000:]
    assert len(wanted["losses"]) == 3
    assert len(set(wanted["losses"])) == 3
    assert found["losses"] == pytest.approx(wanted["losses"], rel=SAME)
    assert found["grad_norms"] == pytest.approx(wanted["grad_norms"], rel=SAME)
    assert wanted["metrics"]["seq_load_balancing_loss"][0] > 1.0
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for name, values in wanted["metrics"].items():
        assert found["metrics"][name] == pytest.approx(values, rel=SAME), name
    sizes = {len(pool) for pool in wanted["pools"].values()}
    assert sizes == set(range(2, 9))
    # 4 layers of the documents in 3 steps of 8 samples
    assert len(wanted["pools"]) > 4 * 3 * 8
    assert found["conflicts"] == []
    assert found["pools"] == wanted["pools"]
    assert found["chosen"] == wanted["chosen"]


def test_expert_parallelism_gives_the_run_of_one_process(run_bridge, tmp_path):
    runs = [_run("one", tmp_path), _run("ep2", tmp_path, ranks=2, sizes={"ep": 2})]
    results = _train(run_bridge, tmp_path, runs)
    _require_same(results["ep2"], results["one"])


@pytest.fixture(scope="module")
def trained(run_bridge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    runs = [_run("one", folder)]
    runs += [
        _run(name, folder, ranks=ranks, sizes=sizes, overrides=overrides)
        for name, (ranks, sizes, overrides) in LAYOUTS.items()
    ]
    overlap = "overlap_moe_expert_parallel_comm"
    runs += [
        _run(name, folder, ranks=2, sizes={"ep": 2}, bf16=True, **{overlap: is_on})
        for name, is_on in (("bf16", False), ("bf16 overlap", True))
    ]
    return _train(run_bridge, folder, runs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_run_of_one_process(trained, layout):
    _require_same(trained[layout], trained["one"])


@pytest.mark.slow
def test_overlap_of_expert_parallelism_changes_nothing(trained):
    _require_same(trained["bf16 overlap"], trained["bf16"])
