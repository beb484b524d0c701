"""The command select and its options, up to the Selection file; on a made-up model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support import experts

from emo_megatron.cli import main
from emo_megatron.commands.options import MergeStatsOptions, ModelOptions, SelectOptions
from emo_megatron.commands.select import merge_files, select
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import load_stats

CHECKPOINT = Path("checkpoint")


@pytest.fixture
def files(tmp_path):
    """Two statistics files."""
    return tuple(
        experts.statistics(count, name=name).save(tmp_path / f"{name}.safetensors")
        for count, name in ((3, "one"), (5, "two"))
    )


def test_a_selection_says_where_it_comes_from(files, tmp_path):
    options = SelectOptions(stats=files, keep="4", output=tmp_path / "s.json")
    chosen = select(options)
    assert load_selection(tmp_path / "s.json") == chosen
    assert chosen.num_kept == (3, 3, 3)
    assert chosen.keep_k(num_shared=1) == 4
    assert (chosen.method, chosen.seed, chosen.model) == ("mean_prob", None, "f00d")
    assert [entry["file"] for entry in chosen.data["calibration"]] == ["one", "two"]


def test_random_needs_no_scores_and_tells_its_seed(files, tmp_path):
    options = SelectOptions(stats=files[:1], keep="50%", method="random", seed=6, output=tmp_path / "s.json")
    chosen = select(options)
    assert chosen.seed == 6
    other = dataclasses.replace(options, seed=7, output=tmp_path / "other.json")
    assert select(other).experts != chosen.experts


def test_a_budget_is_noted(files, tmp_path):
    options = SelectOptions(stats=files, budget_mb=0.118, output=tmp_path / "s.json")
    chosen = select(options)
    assert chosen.num_kept == (3, 3, 3)
    assert chosen.data["budget_mb"] == 0.118


def test_a_budget_counts_the_bytes_that_are_stored(tmp_path):
    wide = dataclasses.replace(experts.FACTS, bytes_per_parameter=4)
    stats = dataclasses.replace(experts.statistics(3), model=wide).save(tmp_path / "s.safetensors")
    options = SelectOptions(stats=(stats,), budget_mb=0.236, output=tmp_path / "s.json")
    assert select(options).num_kept == (3, 3, 3)
    other = dataclasses.replace(options, bytes_per_parameter=2.0, output=tmp_path / "other.json")
    assert select(other).num_kept == (8, 8, 8)


def test_the_smallest_module_notes_its_losses(files, tmp_path):
    options = SelectOptions(
        stats=files, max_rise="10%", held_out=Path("held-out"), checkpoint=CHECKPOINT, output=tmp_path / "s.json"
    )
    model = experts.MadeUpModel(lambda kept: 2.0 + (8 - kept) / 20)
    chosen = select(options, model=model, held_out=experts.documents(2, name="held-out"))
    assert chosen.num_kept == (4, 4, 4)
    assert chosen.data["held_out"]["file"] == "held-out"
    assert chosen.data["max_rise"] == "10%"
    assert chosen.data["full_loss"] == 2.0
    assert chosen.data["losses"]["4"] == pytest.approx(2.2)
    assert model.seen == []


def test_without_statistics_the_model_is_measured_now(tmp_path):
    options = SelectOptions(
        checkpoint=CHECKPOINT, data=Path("data"), method="reap", keep="4", output=tmp_path / "s.json"
    )
    chosen = select(options, model=experts.MadeUpModel(), documents=experts.documents(4))
    assert chosen.data["calibration"] == [experts.documents(4).source]
    assert chosen.experts[0] == (0, 1, 2)


def test_what_chooses_the_experts_is_not_held_out(files, tmp_path):
    options = SelectOptions(
        stats=files, max_rise="1%", held_out=Path("held-out"), checkpoint=CHECKPOINT, output=tmp_path / "s.json"
    )
    same = load_stats(files[0]).data[0]
    held_out = dataclasses.replace(experts.documents(2), source=same)
    with pytest.raises(ValueError, match="held-out holds the documents that choose"):
        select(options, model=experts.MadeUpModel(), held_out=held_out)
    assert not (tmp_path / "s.json").exists()
    # experts that are drawn are chosen by no documents
    drawn = dataclasses.replace(options, method="random")
    chosen = select(drawn, model=experts.MadeUpModel(), held_out=held_out)
    assert chosen.data["calibration"] == []


def rising(kept):
    """A loss by which a bound of 10 % keeps four of eight experts."""
    return 2.0 + (8 - kept) / 20


LAYERWISE = {"method": "layerwise", "data": Path("data")}
SMALLEST = {"max_rise": "10%", "held_out": Path("held-out")}


def choose(options, model):
    """The command on a made-up model, with the documents that its options name."""
    return select(
        options,
        model=model,
        documents=None if options.data is None else experts.documents(4),
        held_out=None if options.held_out is None else experts.documents(2, name="held-out"),
    )


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        pytest.param(LAYERWISE | {"keep": "4"}, {"fails_at": 2}, id="layerwise"),
        pytest.param(SMALLEST | {"stats": True}, {"loss_fails_at": 2}, id="max-rise"),
        pytest.param(SMALLEST | {"data": Path("data")}, {"loss_fails_at": 1}, id="measured now"),
        pytest.param(LAYERWISE | SMALLEST, {"fails_at": 4}, id="layerwise, in a layer"),
        pytest.param(LAYERWISE | SMALLEST, {"loss_fails_at": 2}, id="layerwise, at a loss"),
    ],
)
def test_an_interrupted_select_goes_on_and_gives_the_same(files, tmp_path, changes, stop):
    changes = changes | ({"stats": files} if changes.get("stats") else {})
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", **changes)
    whole = experts.MadeUpModel(rising)
    want = choose(dataclasses.replace(options, output=tmp_path / "whole.json"), whole)
    stopped = experts.MadeUpModel(rising, **stop)
    with pytest.raises(KeyboardInterrupt):
        choose(options, stopped)
    assert not options.output.exists()
    again = experts.MadeUpModel(rising)
    assert choose(options, again) == want
    assert options.output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    # nothing was measured twice
    assert len(stopped.seen) + stopped.num_losses > 0
    assert stopped.seen + again.seen == whole.seen
    assert stopped.num_losses + again.num_losses == whole.num_losses
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"keep": "5"}, "keep"),
        ({"keep": None, **SMALLEST}, "held_out, keep, max_rise"),
        ({"method": "mean_prob"}, "method"),
        ({"documents": experts.documents(4, name="other")}, "data"),
        ({"model": {"facts": dataclasses.replace(experts.FACTS, fingerprint="beef")}}, "model"),
        ({"model": {"setting": dataclasses.replace(experts.SETTING, weights="x")}}, "weights"),
        ({"model": {"setting": dataclasses.replace(experts.SETTING, megatron="-x")}}, "megatron"),
        ({"stats": True}, "stats"),
    ],
)
def test_the_progress_of_another_select_is_refused(files, tmp_path, changes, differs):
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", keep="4", **LAYERWISE)
    with pytest.raises(KeyboardInterrupt):
        choose(options, experts.MadeUpModel(fails_at=2))
    kept = tmp_path / "s.json.partial"
    before = kept.read_bytes()
    changes = changes | ({"stats": files} if "stats" in changes else {})
    model = experts.MadeUpModel(rising, **changes.pop("model", {}))
    documents = changes.pop("documents", experts.documents(4))
    held_out = experts.documents(2, name="held-out")
    with pytest.raises(ValueError, match=f"partial is the progress .* whose {differs} differ: .*--output"):
        select(
            dataclasses.replace(options, **changes),
            model=model,
            documents=documents,
            held_out=held_out if "held_out" in changes else None,
        )
    assert (model.seen, model.num_losses) == ([], 0)
    assert kept.read_bytes() == before
    loss = before.decode().replace('"found": {', '"found": {"all experts: loss": NaN, ')
    assert "NaN" in loss
    for text in ("[1]", "{", '{"format": "f", "question": {}, "found": {}}', loss):
        kept.write_text(text)
        with pytest.raises(ValueError, match="is not the progress of a select"):
            choose(options, model)


def test_what_was_measured_is_of_the_select_that_was_interrupted(tmp_path):
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", data=Path("data"), **SMALLEST)
    with pytest.raises(KeyboardInterrupt):
        choose(options, experts.MadeUpModel(rising, loss_fails_at=0))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(kept) == ["s.json.partial", "s.json.partial.safetensors"]
    texts = {"documents": experts.documents(3, name="other"), "held_out": experts.documents(2, name="held-out")}
    with pytest.raises(ValueError, match="whose data differ: ") as refused:
        select(options, model=experts.MadeUpModel(rising), **texts)
    for name in kept:
        assert str(tmp_path / name) in str(refused.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    # without the file that tells what they are of, statistics are nobody's
    (tmp_path / "s.json.partial").unlink()
    model = experts.MadeUpModel(rising)
    assert select(options, model=model, **texts).data["calibration"][0]["file"] == "other"
    assert [count for count, _ in model.seen] == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_another_select_leaves_statistics_alone_that_are_being_measured(tmp_path):
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", data=Path("data"), keep="4")
    # statistics are saved every 256 documents
    documents, other = experts.documents(260), experts.documents(3, name="other")
    with pytest.raises(KeyboardInterrupt):
        select(options, model=experts.MadeUpModel(fails_at=1), documents=documents)
    with pytest.raises(ValueError, match=r"whose data differ: .*partial\.safetensors\.partial$"):
        select(options, model=experts.MadeUpModel(), documents=other)
    again = experts.MadeUpModel()
    select(options, model=again, documents=documents)
    assert [count for count, _ in again.seen] == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("changes", "stop", "raised"),
    [
        ({"data": Path("data")}, {"fails_at": 0}, KeyboardInterrupt),
        # what reap needs is not in these statistics, which is said before a loss is measured
        ({"method": "reap", "stats": True, "keep": None, **SMALLEST}, {}, ValueError),
    ],
)
def test_a_select_that_found_nothing_leaves_nothing(tmp_path, changes, stop, raised):
    stats = experts.statistics(3, outputs=False).save(tmp_path / "in" / "stats.safetensors")
    changes = {"keep": "4"} | changes | ({"stats": (stats,)} if "stats" in changes else {})
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", **changes)
    model = experts.MadeUpModel(**stop)
    with pytest.raises(raised):
        choose(options, model)
    assert (model.seen, model.num_losses) == ([], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_rank_is_told_what_was_found_before(tmp_path):
    options = SelectOptions(checkpoint=CHECKPOINT, output=tmp_path / "s.json", keep="4", **LAYERWISE)
    with pytest.raises(KeyboardInterrupt):
        choose(options, experts.MadeUpModel(fails_at=2))
    found = json.loads((tmp_path / "s.json.partial").read_text())["found"]
    elsewhere = dataclasses.replace(options, output=tmp_path / "elsewhere" / "s.json")
    # the output does not exist, and two layers are known
    other = experts.OtherRank(None, found)
    assert choose(elsewhere, other) == choose(options, experts.MadeUpModel())
    assert len(other.seen) == 1
    assert not elsewhere.output.parent.exists()


def test_an_output_that_exists_is_refused_before_anything_is_measured(tmp_path):
    output = tmp_path / "s.json"
    output.write_text("mine")
    model = experts.MadeUpModel()
    options = SelectOptions(checkpoint=CHECKPOINT, output=output, keep="4", **LAYERWISE)
    with pytest.raises(ValueError, match=r"s\.json exists"):
        choose(options, model)
    assert model.seen == []
    assert output.read_text() == "mine"


def test_statistics_of_another_model_are_refused(files, tmp_path):
    options = SelectOptions(
        stats=files, max_rise="1%", held_out=Path("held-out"), checkpoint=CHECKPOINT, output=tmp_path / "s.json"
    )
    other = experts.MadeUpModel(facts=dataclasses.replace(experts.FACTS, fingerprint="beef"))
    with pytest.raises(ValueError, match="different models"):
        select(options, model=other, held_out=experts.documents(2))
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"stats": 1}, "one of --keep, --max-rise and --budget-mb.*got none"),
        ({"stats": 1, "keep": "4", "data": 1}, "--data would not be read.* beside --stats"),
        ({"stats": 1, "budget_mb": float("inf")}, "--budget-mb must be a finite number above 0; got inf"),
        ({"stats": 1, "budget_mb": 3.0, "bytes_per_parameter": 0.0}, "parameter must be a finite number above 0"),
        ({"stats": 1, "budget_mb": float("nan")}, "--budget-mb must be a finite number"),
        (
            {"stats": 1, "budget_mb": 3.0, "bytes_per_parameter": float("nan")},
            "--bytes-per-parameter must be a finite number above 0; got nan",
        ),
        ({"stats": 1, "keep": "4", "budget_mb": 3.0}, "got --keep and --budget-mb"),
        ({"keep": "4"}, "give --stats, or --checkpoint and --data"),
        ({"keep": "4", "checkpoint": 1}, "--method mean_prob needs calibration .* or --stats"),
        ({"keep": "4", "stats": 1, "method": "layerwise"}, "layerwise runs the model"),
        ({"keep": "4", "checkpoint": 1, "method": "layerwise"}, "layerwise needs calibration"),
        ({"stats": 1, "max_rise": "1%", "checkpoint": 1}, "--max-rise needs --held-out"),
        ({"stats": 1, "max_rise": "1%", "held_out": 1}, "--max-rise runs the model"),
        ({"stats": 1, "max_rise": "some", "held_out": 1, "checkpoint": 1}, "--max-rise must be"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, what):
    places = {"stats": (Path("s"),), "data": Path("d"), "checkpoint": CHECKPOINT, "held_out": Path("h")}
    given = {name: places[name] if value == 1 else value for name, value in options.items()}
    with pytest.raises(ValueError, match=what):
        SelectOptions(output=Path("s.json"), **given)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rows": 0}, "--rows must be 1 or more; got 0"),
        ({"processes": 3, "tensor_parallel": 2}, "--processes must be a multiple.*got 3"),
        ({"processes": 4, "pipeline_parallel": 2, "expert_parallel": 4}, "got 4"),
    ],
)
def test_impossible_layouts_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        ModelOptions(**options)


def test_the_command_does_not_write_over_a_selection(files, tmp_path, capsys):
    output = tmp_path / "s.json"
    command = ["select", "--stats", str(files[0]), "--keep", "4", "--output", str(output)]
    assert main(command) == 0
    before = output.read_bytes()
    assert main([*command, "--method", "frequency"]) == 2
    assert "s.json exists" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_merging_files_adds_them_up(files, tmp_path):
    options = MergeStatsOptions(stats=files, output=tmp_path / "both.safetensors")
    merged = load_stats(merge_files(options))
    assert merged.num_documents == 8
    with pytest.raises(ValueError, match="exists"):
        merge_files(options)
