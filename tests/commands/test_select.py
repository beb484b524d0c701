"""The command select and its options, up to the Selection file; on a made-up model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import experts

from emo_megatron.commands import select
from emo_megatron.commands.options import ModelOptions
from emo_megatron.commands.select import Options
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.experts.stats import load_stats

CHECKPOINT = Path("checkpoint")
LAYERWISE = {"method": "layerwise", "data": Path("data")}
SMALLEST = {"max_loss_increase": "10%", "validation_data": Path("held-out")}


@pytest.fixture
def files(tmp_path):
    """Two statistics files."""
    return tuple(
        experts.statistics(count, name=name).save(tmp_path / f"{name}.safetensors")
        for count, name in ((3, "one"), (5, "two"))
    )


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """Runs the command, on a made-up model if one is given."""

    def run(*, model=None, read=None, output="s.json", **changes) -> Selection:
        experts.open_as(monkeypatch, model, read=read)
        return load_selection(select.run(Options(output=tmp_path / output, **changes)))

    return run


def rising(kept):
    """A loss by which a bound of 10 % keeps four of eight experts."""
    return 2.0 + (8 - kept) / 20


def test_a_selection_says_where_it_comes_from(files, choose):
    chosen = choose(stats=files, keep="3 routed")
    assert chosen.num_kept == (3, 3, 3)
    assert chosen.keep_k(num_shared=1) == 4
    assert (chosen.method, chosen.seed, chosen.model) == ("mean_prob", None, "f00d")
    assert [entry["file"] for entry in chosen.data["calibration"]] == ["one", "two"]


def test_a_budget_counts_the_bytes_that_are_stored(files, choose, tmp_path):
    chosen = choose(stats=files, budget_mb=0.118)
    assert (chosen.num_kept, chosen.data["budget_mb"]) == ((3, 3, 3), 0.118)
    wide = dataclasses.replace(experts.METADATA, bytes_per_parameter=4)
    stats = dataclasses.replace(experts.statistics(3), model=wide).save(tmp_path / "wide")
    assert choose(stats=(stats,), budget_mb=0.236, output="wide.json").num_kept == (3, 3, 3)
    narrow = choose(stats=(stats,), budget_mb=0.236, bytes_per_parameter=2.0, output="narrow.json")
    assert narrow.num_kept == (8, 8, 8)


def test_the_smallest_module_notes_its_losses(files, choose):
    model = experts.MadeUpModel(rising)
    chosen = choose(model=model, stats=files, checkpoint=CHECKPOINT, **SMALLEST)
    assert chosen.num_kept == (4, 4, 4)
    assert chosen.data["validation_data"]["file"] == "held-out"
    assert chosen.data["max_loss_increase"] == "10%"
    assert chosen.data["full_loss"] == 2.0
    assert chosen.data["losses"]["4"] == pytest.approx(2.2)
    assert model.seen == []


def test_without_statistics_the_model_is_measured_now(choose):
    chosen = choose(
        model=experts.MadeUpModel(), checkpoint=CHECKPOINT, data=Path("data"), method="reap", keep="3 routed"
    )
    assert chosen.data["calibration"][0]["file"] == "data"
    assert chosen.experts[0] == (0, 1, 2)


def test_what_chooses_the_experts_is_not_held_out(files, choose, tmp_path):
    same = load_stats(files[0]).data[0]
    changes = {"stats": files, "checkpoint": CHECKPOINT, "model": experts.MadeUpModel(), **SMALLEST}
    changes["read"] = lambda path, calibration: dataclasses.replace(experts.documents(2), source=same)
    with pytest.raises(ValueError, match="--validation-data"):
        choose(**changes)
    assert not (tmp_path / "s.json").exists()
    # experts that are drawn are chosen by no documents
    assert choose(**changes, method="random").data["calibration"] == []


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        pytest.param(LAYERWISE | {"keep": "3 routed"}, {"fails_at": 2}, id="layerwise"),
        pytest.param(SMALLEST | {"stats": True}, {"loss_fails_at": 2}, id="max-rise"),
        pytest.param(SMALLEST | {"data": Path("data")}, {"loss_fails_at": 1}, id="measured now"),
        pytest.param(LAYERWISE | SMALLEST, {"fails_at": 4}, id="layerwise, in a layer"),
        pytest.param(LAYERWISE | SMALLEST, {"loss_fails_at": 2}, id="layerwise, at a loss"),
    ],
)
def test_an_interrupted_select_goes_on_and_gives_the_same(files, choose, tmp_path, changes, stop):
    changes = {"checkpoint": CHECKPOINT} | changes | ({"stats": files} if changes.get("stats") else {})
    whole, stopped, again = (experts.MadeUpModel(rising, **s) for s in ({}, stop, {}))
    choose(model=whole, output="whole.json", no_cache=True, **changes)
    with pytest.raises(KeyboardInterrupt):
        choose(model=stopped, **changes)
    assert not (tmp_path / "s.json").exists()
    choose(model=again, **changes)
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    # nothing was measured twice
    assert len(stopped.seen) + stopped.num_losses > 0
    assert stopped.seen + again.seen == whole.seen
    assert stopped.num_losses + again.num_losses == whole.num_losses
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 2 + [".safetensors"] * 2


@pytest.mark.parametrize("changes", [SMALLEST, LAYERWISE | {"keep": "3 routed"}])
def test_ranks_choose_alike_and_the_first_writes(files, choose, tmp_path, changes):
    changes = changes | ({"stats": files} if "validation_data" in changes else {})
    want = choose(model=experts.MadeUpModel(rising), checkpoint=CHECKPOINT, **changes)
    (tmp_path / "s.json").unlink()
    # it is told nothing of a cache, which is the writer's
    other = experts.OtherRank(*[None] * 9, loss=rising)
    with pytest.raises(FileNotFoundError):
        choose(model=other, checkpoint=CHECKPOINT, **changes)
    assert want.num_kept == ((4, 4, 4) if "validation_data" in changes else (3, 3, 3))
    assert (len(other.seen), other.num_losses) == ((0, 4) if "validation_data" in changes else (3, 0))


def test_statistics_of_another_model_or_without_outputs_are_refused(files, choose, tmp_path):
    other = experts.MadeUpModel(metadata=dataclasses.replace(experts.METADATA, fingerprint="beef"))
    changes = {"checkpoint": CHECKPOINT, **SMALLEST}
    with pytest.raises(ValueError, match="--stats and --checkpoint"):
        choose(model=other, stats=files, **changes)
    stats = experts.statistics(3, outputs=False).save(tmp_path / "in" / "stats.safetensors")
    model = experts.MadeUpModel()
    with pytest.raises(ValueError, match="--outputs"):
        choose(model=model, stats=(stats,), method="reap", **changes)
    # which is said before a loss is measured
    assert model.num_losses == 0
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"stats": 1}, "one of --keep, --max-loss-increase and --budget-mb.*got none"),
        ({"stats": 1, "keep": "3 routed", "data": 1}, "--stats does not read --data"),
        ({"stats": 1, "budget_mb": float("inf")}, "--budget-mb must be a finite number above 0; got inf"),
        ({"stats": 1, "budget_mb": 3.0, "bytes_per_parameter": 0.0}, "parameter must be a finite number above 0"),
        ({"stats": 1, "budget_mb": float("nan")}, "--budget-mb must be a finite number"),
        (
            {"stats": 1, "budget_mb": 3.0, "bytes_per_parameter": float("nan")},
            "--bytes-per-parameter must be a finite number above 0; got nan",
        ),
        ({"stats": 1, "keep": "3 routed", "budget_mb": 3.0}, "got --keep and --budget-mb"),
        ({"keep": "3 routed"}, "give --stats, or.*--checkpoint and --data"),
        ({"keep": "3 routed", "checkpoint": 1}, "--method mean_prob needs calibration .* or --stats"),
        ({"keep": "3 routed", "stats": 1, "method": "layerwise"}, "layerwise runs the model"),
        ({"keep": "3 routed", "checkpoint": 1, "method": "layerwise"}, "layerwise needs calibration"),
        ({"stats": 1, "max_loss_increase": "1%", "checkpoint": 1}, "--max-loss-increase needs --validation-data"),
        ({"stats": 1, "max_loss_increase": "1%", "validation_data": 1}, "--max-loss-increase runs the model"),
        (
            {"stats": 1, "max_loss_increase": "some", "validation_data": 1, "checkpoint": 1},
            "--max-loss-increase must be",
        ),
        ({"stats": 1, "keep": "3 routed", "method": "best"}, "--method must be.*mean_prob.*got best"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, what):
    places = {"stats": (Path("s"),), "data": Path("d"), "checkpoint": CHECKPOINT, "validation_data": Path("h")}
    given = {name: places[name] if value == 1 else value for name, value in options.items()}
    with pytest.raises(ValueError, match=what):
        Options(output=Path("s.json"), **given)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"micro_batch_size": 0}, "--micro-batch-size must be 1 or more; got 0"),
        ({"nproc_per_node": 3, "tensor_parallel": 2}, "--nproc-per-node must be a multiple.*got 3"),
        ({"nproc_per_node": 4, "pipeline_parallel": 2, "expert_parallel": 4}, "got 4"),
    ],
)
def test_impossible_layouts_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        ModelOptions(**options)


@pytest.mark.parametrize(("kind", "can_import"), [("olmoe", False), ("qwen3_moe", False), ("qwen2_moe", True)])
def test_several_processes_for_a_hugging_face_folder_are_refused(tmp_path, kind, can_import):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(ValueError, match="remove --nproc-per-node and --megatron-args") as caught:
        ModelOptions(nproc_per_node=2, no_cache=True).open(tmp_path, texts=[])
    assert ("the command import" in str(caught.value)) == can_import
