"""A run with pools through Bridge that stops, or is killed, goes on as if it had not; validation and other loaders."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.pretraining import stored_tensors

SAVED = "latest_checkpointed_iteration.txt"


def _train(run_bridge, folder, *runs):
    """The runs' results by name; each continues what lies in its folder."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    run_bridge("-m", "support.bridge_run", file)
    return json.loads(file.with_suffix(".results.json").read_text())


def _run(name, folder, **more):
    return {"name": name, "folder": str(folder), "steps": 6, **more}


def _require_same_end(whole, resumed, folders, *, has_prediction):
    for result in (whole, resumed):
        assert not any(result["codes"]), result["printed"][-4000:]
    # 4 where the kill came before an asynchronous save of step 4 was whole
    assert len(resumed["losses"]) in (2, 4)
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert all(whole["pools"][key] == pool for key, pool in resumed["pools"].items())
    stored = [stored_tensors(folder / "iter_0000006") for folder in folders]
    assert stored[0].keys() == stored[1].keys()
    assert any("exp_avg" in key for key in stored[0])
    assert any(key.startswith("mtp.") for key in stored[0]) == has_prediction
    for key, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][key]), key


@pytest.fixture(scope="module")
def stopped(run_bridge, tmp_path_factory):
    """Runs by name, and where they lie: whole; first and resumed; others that begin from those or alone.

    They have a layer of multi-token prediction, and attention keeps to documents.
    """
    folder = tmp_path_factory.mktemp("resume")
    whole, parts, other = folder / "whole", folder / "parts", {"pool_min": 3}
    unsaved = {"checkpoint.save": None}

    def predicting(*args, options=(), **more):
        options = {"model.mtp_num_layers": 1, **dict(options)}
        return _run(*args, documents="attention", options=options, **more)

    results = _train(
        run_bridge,
        folder,
        predicting("whole", whole),
        predicting("first", parts, options={"train.exit_interval": 4}),
        predicting("other pools", parts, pool=other),
        predicting("resumed", parts),
        predicting("finetuned", parts, pool=other, options={"checkpoint.finetune": True} | unsaved, steps=2),
        predicting(
            "validated",
            folder / "eval",
            pool={"pool_eval": 4},
            split="90,10,0",
            options={"validation.eval_iters": 1, "validation.eval_interval": 2} | unsaved,
            steps=2,
        ),
        predicting("standard", folder / "standard", pool={"pool_min": None}, options=unsaved, steps=1),
    )
    return results, (whole, parts)


def test_a_run_that_stops_goes_on_to_the_same_bits(stopped):
    results, folders = stopped
    _require_same_end(results["whole"], results["resumed"], folders, has_prediction=True)
    assert results["first"]["losses"] == results["whole"]["losses"][:4]


def test_other_pools_on_resume_are_an_error(stopped):
    found = stopped[0]["other pools"]
    assert any(found["codes"])
    assert not found["losses"]
    assert "ValueError" in found["printed"]
    assert "model.pool_min was 2 and is 3" in found["printed"]


def test_without_pools_it_is_the_standard_moe_with_the_same_documents(stopped):
    results, _ = stopped
    found, whole = results["standard"], results["whole"]
    assert not any(found["codes"]), found["printed"][-4000:]
    assert not found["pools"]
    assert "pool_size" not in found["metrics"]
    assert found["metrics"]["experts_per_document"][0] > whole["metrics"]["experts_per_document"][0]
    assert found["losses"][0] == pytest.approx(whole["losses"][0], rel=0.01)


def test_finetuning_may_have_other_pools(stopped):
    results, _ = stopped
    finetuned = results["finetuned"]
    assert not any(finetuned["codes"]), finetuned["printed"][-4000:]
    # it starts from the trained weights
    assert finetuned["losses"][0] < results["whole"]["losses"][3]
    assert min(map(len, finetuned["pools"].values())) == 3


def test_validation_has_pools_of_its_own_size(stopped):
    validated = stopped[0]["validated"]
    assert not any(validated["codes"]), validated["printed"][-4000:]
    assert validated["eval_sizes"] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True])
def test_a_killed_run_goes_on_from_its_last_checkpoint(run_bridge, tmp_path, is_async):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"checkpoint.async_save": is_async, "checkpoint.save_interval": 2}
    killed_run = _run("killed", killed, kill_at=5, options=options)
    first = _train(run_bridge, tmp_path, killed_run)["killed"]
    assert first["codes"] == [-9]
    assert not (killed / "iter_0000006").exists()
    results = _train(run_bridge, tmp_path, _run("whole", whole), _run("resumed", killed, options=options))
    folders = (whole, killed)
    _require_same_end(results["whole"], results["resumed"], folders, has_prediction=False)


@pytest.mark.slow
def test_other_loaders_train_and_warn(run_bridge, tmp_path):
    two = {"ranks": 2, "overrides": ["model.expert_model_parallel_size=2"]}
    loaders = ("single", "cyclic", "batch")
    results = _train(
        run_bridge,
        tmp_path,
        *(
            _run(
                f"{loader} {ranks}",
                tmp_path / f"{loader}{ranks}",
                options={"dataset.dataloader_type": loader, "checkpoint.save": None},
                **{"steps": 2} | more,
            )
            for loader in loaders
            for ranks, more in ((1, {}), (2, two))
        ),
    )
    for name, result in results.items():
        assert not any(result["codes"]), result["printed"][-4000:]
        # 4 layers of more than a document a sample
        assert len(result["pools"]) > 4 * 2 * 8
        has_warned = "pool sizes depend on the number of" in result["printed"]
        assert has_warned == (not name.startswith("single"))
    # a rank's first weights, and so its pools, depend on the layout; sizes do not
    sizes = {
        name: {document: len(pool) for document, pool in result["pools"].items()} for name, result in results.items()
    }
    same = [sizes[f"{loader} 1"] == sizes[f"{loader} 2"] for loader in loaders]
    assert same == [True, False, False]


@pytest.mark.slow
def test_torchrun_trains_saves_and_takes_overrides(start_bridge, tmp_path):
    from support.bridge_run import write_documents

    data = write_documents(tmp_path / "documents", eod=511)
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"folder": str(tmp_path / "run"), "data": data}))
    (tmp_path / "run").mkdir()
    printed = start_bridge(
        *(Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2"),
        *("-m", "support.bridge_run", run, "model.pool_min=3", "train.train_iters=4"),
        *("model.expert_model_parallel_size=2", "checkpoint.save_interval=4"),
    )
    seen = json.loads((tmp_path / "run" / "rank1.json").read_text())
    assert len(seen["losses"]) == 4
    assert seen["losses"][-1] < seen["losses"][0]
    assert min(map(len, seen["pools"].values())) == 3
    assert " pools |" in printed
    assert (tmp_path / "run" / SAVED).read_text() == "4"
    config = (tmp_path / "run" / "iter_0000004" / "run_config.yaml").read_text()
    assert "pool_min: 3" in config
    assert "PoolOlMoEModelProvider" in config
