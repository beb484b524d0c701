"""Bridge's pretrain() under every layout gives the run of one process: losses, gradient norms, pools, experts."""

import json

import pytest

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
KINDS = {
    "plain": {},
    "prediction": {"options": {"model.mtp_num_layers": 2}},
    # Megatron divides the loss of prediction by the tokens of a rank's part of a micro-batch, which context
    # parallelism changes
    "exact prediction": {"options": {"model.mtp_num_layers": 2}, "exact": True},
    # as many as Megatron can overlap
    "one prediction": {"options": {"model.mtp_num_layers": 1}},
    "attention": {"documents": "attention"},
}
KINDS["attention, prediction"] = KINDS["exact prediction"] | KINDS["attention"]
SHARD = ("model.sequence_parallel=true",)
RECOMPUTE = ("model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1")
# in one batch, messages both ways between two stages would be mixed up over gloo
INTERLEAVED = ("model.overlap_p2p_comm=true", "model.batch_p2p_comm=false")
LAYOUTS = {
    "pp2 ep2": ("plain", 4, {"pp": 2, "ep": 2}, ()),
    "pp4": ("plain", 4, {"pp": 4}, ()),
    "vpp2": ("plain", 2, {"pp": 2, "vpp": 2}, INTERLEAVED),
    "tp2": ("plain", 2, {"tp": 2}, SHARD),
    "cp2": ("plain", 2, {"cp": 2}, ()),
    "distributed optimizer": (
        "plain",
        2,
        {"ep": 2},
        ("optimizer.use_distributed_optimizer=true", "ddp.use_distributed_optimizer=true"),
    ),
    # between the stages of a pipeline, other micro-batches come before a backward
    "recompute moe": (
        "plain",
        2,
        {"pp": 2},
        ("model.recompute_granularity=selective", "model.recompute_modules=[moe]"),
    ),
    "recompute full": ("plain", 2, {"pp": 2}, RECOMPUTE),
    "prediction pp2": ("prediction", 2, {"pp": 2}, ()),
    "prediction vpp2": ("prediction", 2, {"pp": 2, "vpp": 2}, INTERLEAVED),
    # on a stage of its own
    "prediction pp4": ("prediction", 4, {"pp": 4}, ("model.pipeline_model_parallel_layout='Ett|tt|mm|L'",)),
    "prediction tp2": ("prediction", 2, {"tp": 2}, SHARD),
    "prediction recompute": ("prediction", 2, {"pp": 2}, RECOMPUTE),
    "prediction cp2": ("exact prediction", 2, {"cp": 2}, ()),
    "attention pp2": ("attention", 2, {"pp": 2}, ()),
    "attention cp4": ("attention", 4, {"cp": 4}, ()),
    "attention cp2 ep2": ("attention", 4, {"cp": 2, "ep": 2}, ()),
    "attention cp2 pp2": ("attention, prediction", 4, {"cp": 2, "pp": 2}, ()),
    "attention cp2 tp2": ("attention, prediction", 4, {"cp": 2, "tp": 2}, SHARD),
}
"""Name -> kind of run, ranks, sizes of parallelism, other overrides."""
OVERLAPPED = {
    "plain": (2, {"ep": 2}, ()),
    "attention": (2, {"ep": 2}, ()),
    "one prediction": (4, {"ep": 2, "pp": 2, "vpp": 2}, INTERLEAVED),
}
"""Kind of run -> layout in which expert-parallel messages overlap with computing."""

SAME = 1e-6
"""Relative: sums in another order."""


def _run(name, folder, *, kind, ranks=1, sizes=None, overrides=(), **options):
    parallel = [PARALLEL[axis] + str(size) for axis, size in (sizes or {}).items()]
    return {
        "name": name,
        "folder": str(folder / name.replace(" ", "_")),
        "load": str(folder / _start(kind)),
        "ranks": ranks,
        "overrides": [*parallel, *overrides],
        **KINDS[kind],
        **options,
    }


def _start(kind):
    """The folder with the weights that runs of this kind begin from."""
    return f"start_{_layers(kind)}"


def _layers(kind):
    """How many layers have pools."""
    return 4 + KINDS[kind].get("options", {}).get("model.mtp_num_layers", 0)


def _train(run_bridge, folder, runs, *, kinds):
    """The runs' results by name, and by its name that of one process of each kind."""
    starts = {_start(kind): KINDS[kind].get("options", {}) for kind in kinds}
    before = [
        {"name": name, "folder": str(folder / name), "steps": 1, "options": options} for name, options in starts.items()
    ]
    before += [_run(kind, folder, kind=kind) for kind in kinds]
    file = folder / "runs.json"
    file.write_text(json.dumps([*before, *runs]))
    run_bridge("-m", "support.bridge_run", file)
    return json.loads(file.with_suffix(".results.json").read_text())


def _require_same(found, wanted, *, kind):
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
    layers = _layers(kind)
    # of the documents in 3 steps of 8 samples
    assert len(wanted["pools"]) > layers * 3 * 8
    assert {key.split("/")[0] for key in wanted["pools"]} == set(map(str, range(1, layers + 1)))
    assert found["conflicts"] == []
    assert found["pools"] == wanted["pools"]
    assert found["chosen"] == wanted["chosen"]


@pytest.fixture(scope="module")
def few(run_bridge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    kinds = ("prediction", "attention, prediction")
    runs = [
        _run("ep2", folder, kind="prediction", ranks=2, sizes={"ep": 2}),
        _run("cp2", folder, kind="attention, prediction", ranks=2, sizes={"cp": 2}),
    ]
    return _train(run_bridge, folder, runs, kinds=kinds)


def test_expert_parallelism_gives_the_run_of_one_process(few):
    _require_same(few["ep2"], few["prediction"], kind="prediction")
    assert few["ep2"]["are_predictions_masked"] == [True]


def test_documents_cut_over_ranks_give_the_run_of_one_process(few):
    kind = "attention, prediction"
    _require_same(few["cp2"], few[kind], kind=kind)
    # attention that keeps to documents is another model
    assert few["cp2"]["losses"][0] != pytest.approx(few["prediction"]["losses"][0], rel=1e-4)


@pytest.fixture(scope="module")
def trained(run_bridge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    runs = [
        _run(name, folder, kind=kind, ranks=ranks, sizes=sizes, overrides=overrides)
        for name, (kind, ranks, sizes, overrides) in LAYOUTS.items()
    ]
    for kind, (ranks, sizes, overrides) in OVERLAPPED.items():
        bf16 = {"kind": kind, "ranks": ranks, "sizes": sizes, "overrides": overrides, "bf16": True}
        runs += [
            _run(f"{kind} bf16", folder, **bf16),
            _run(f"{kind} overlap", folder, **bf16, overlap_moe_expert_parallel_comm=True),
        ]
    return _train(run_bridge, folder, runs, kinds=KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_run_of_one_process(trained, layout):
    kind = LAYOUTS[layout][0]
    _require_same(trained[layout], trained[kind], kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OVERLAPPED)
def test_overlap_of_expert_parallelism_changes_nothing(trained, kind):
    _require_same(trained[f"{kind} overlap"], trained[f"{kind} bf16"], kind=kind)
