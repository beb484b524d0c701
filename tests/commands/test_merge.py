"""Modules go back where they came from, or together, with every disagreement in the report."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from support import checkpoints, experts
from support.checkpoints import selection_of

from emo_megatron.checkpoint.names import is_of_experts
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.cli import main
from emo_megatron.commands import compose, extract, merge
from emo_megatron.experts.selection import load_selection
from emo_megatron.experts.stats import ExpertStatistics

FIRST, SECOND = [[1, 2, 6, 7], [0, 3, 4, 6]], [[0, 2, 3, 4], [1, 2, 5, 7]]
SHARED_EXPERT = 2
"""Both modules have it in layer 1, and no other."""
FC1 = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
ROUTER = "decoder.layers.0.mlp.router.weight"
ATTENTION = "decoder.layers.1.self_attention.linear_proj.weight"


@pytest.fixture(scope="module")
def parent(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "parent"
    ranks(1).run(checkpoints.save, folder=str(folder), layout={}, config={})
    return folder


def _module(parent, folder, kept, *, change=lambda name, weight: weight):
    """A module, with its weights changed as training might."""
    selection = selection_of(parent, kept).save(folder.with_suffix(".json"))
    cut = folder.with_name(folder.name + "-cut")
    extract.run(extract.Options(checkpoint=parent, selection=selection, output=cut))
    module = MegatronCheckpoint(cut)
    weights = {name: change(name, module.read(name)) for name in module.names}
    notes = {"selection.json": load_selection(selection).save}
    return write_checkpoint(folder, weights, args=module.args, notes=notes)


def _plus(amount, *kinds):
    return lambda name, weight: weight + amount if any(k in name for k in kinds) else weight


@pytest.fixture(scope="module")
def modules(parent):
    """Experts and router trained in the first; experts and attention in the second."""
    folder = parent.parent
    return (
        _module(parent, folder / "one", FIRST, change=_plus(1.0, ".experts.", ".router.")),
        _module(parent, folder / "two", SECOND, change=_plus(2.0, ".experts.", "self_attention")),
    )


@pytest.mark.parametrize("weights", ["experts", "experts+router", "all"])
def test_merging_back_changes_the_modules_rows_alone(parent, modules, tmp_path, weights):
    output = merge.run(merge.Options(parent=parent, modules=modules[:1], output=tmp_path / "merged", weights=weights))
    before, after = MegatronCheckpoint(parent), MegatronCheckpoint(output)
    for name in before.names:
        wanted = before.read(name)
        is_taken = ".experts." in name or (".router." in name and weights != "experts")
        if is_taken and is_of_experts(name):
            wanted[FIRST[int(name.split(".")[2])]] += 1.0
        assert torch.equal(after.read(name), wanted), name
    assert after.args.num_experts == 8
    assert (after.args.pool_min, after.args.pool_max) == (3, 6)
    report = checkpoints.report(output)
    left_out = {row["weight"] for row in report["left_out"]}
    assert (ROUTER in left_out) == (weights == "experts")
    assert report["changed"]["mlp.experts.experts.linear_fc1.weight"] == 8


def test_an_unchanged_module_merges_to_the_parent(ranks, parent, tmp_path):
    same = _module(parent, tmp_path / "same", FIRST)
    output = merge.run(merge.Options(parent=parent, modules=(same,), output=tmp_path / "merged"))
    before, after = (MegatronCheckpoint(path) for path in (parent, output))
    assert all(torch.equal(before.read(n), after.read(n)) for n in before.names)
    assert checkpoints.report(output)["changed"] == {}
    was, now = (
        ranks(1).run(checkpoints.logits, folder=str(path), layout={}, config={})[0] for path in (parent, output)
    )
    assert torch.equal(was, now)


def test_two_modules_that_changed_one_expert(parent, modules, tmp_path):
    def merged(conflict, name):
        return merge.run(merge.Options(parent=parent, modules=modules, output=tmp_path / name, conflict=conflict))

    with pytest.raises(ValueError, match=r"one and two changed expert 2 of layer 1 .*differently.*--conflict"):
        merged("refuse", "none")
    assert list(tmp_path.iterdir()) == []
    before = MegatronCheckpoint(parent).read(FC1, SHARED_EXPERT)
    for conflict, change in (("parent", 0.0), ("average", 1.5), ("one", 1.0), ("two", 2.0)):
        output = merged(conflict, conflict)
        found = MegatronCheckpoint(output).read(FC1)
        torch.testing.assert_close(found[SHARED_EXPERT], before + change)
        report = checkpoints.report(output)
        of_experts = [row for row in report["conflicts"] if ".experts." in row["weight"]]
        assert FC1 in {row["weight"] for row in of_experts}
        assert {row["expert"] for row in of_experts} == {SHARED_EXPERT}
        assert {row["taken"] for row in of_experts} == {conflict}
        # the second's attention stays out, and is listed too
        assert {"weight": ATTENTION, "modules": ["two"], "taken": "parent"} in report["left_out"]


def _amounts(parent, tmp_path, kept, **amounts):
    """Modules with these experts, in which so much was added to every expert."""
    return tuple(
        _module(parent, tmp_path / name, kept[name], change=_plus(amount, ".experts."))
        for name, amount in amounts.items()
    )


def test_a_module_that_left_an_expert_alone_has_no_say(parent, tmp_path):
    kept = {"still": FIRST, "moved": SECOND}
    modules = _amounts(parent, tmp_path, kept, still=0.0, moved=2.0)
    output = merge.run(merge.Options(parent=parent, modules=modules, output=tmp_path / "merged"))
    residual_change_E = (MegatronCheckpoint(output).read(FC1) - MegatronCheckpoint(parent).read(FC1)).mean((1, 2))
    torch.testing.assert_close(residual_change_E, torch.tensor([2.0, 0, 2, 2, 2, 0, 0, 0]))
    assert checkpoints.report(output)["conflicts"] == []
    # nor in an average
    options = compose.Options(
        modules=modules, parent=parent, output=tmp_path / "c", shared="average", conflict="average"
    )
    composed = MegatronCheckpoint(compose.run(replace(options, keep="8 routed", stats=_stats(parent, tmp_path))))
    assert torch.equal(composed.read(FC1), MegatronCheckpoint(output).read(FC1))


def test_the_report_names_whose_value_it_is(parent, tmp_path):
    """a lacks expert 2 of layer 1, about which b and c disagree."""
    kept = {"a": [[0, 1, 3, 4], SECOND[1]], "b": FIRST, "c": SECOND}
    modules = _amounts(parent, tmp_path, kept, a=1.0, b=2.0, c=3.0)
    options = compose.Options(
        modules=modules,
        parent=parent,
        output=tmp_path / "with",
        conflict="a",
        keep="8 routed",
        stats=(*_stats(parent, tmp_path), _stats(parent, tmp_path)[0]),
    )
    output = compose.run(options)
    conflicts = {row["expert"]: row for row in checkpoints.report(output)["conflicts"] if row["weight"] == FC1}
    assert conflicts[2]["taken"] == "parent"
    assert conflicts[2]["modules"] == ["b", "c"]
    assert conflicts[1]["taken"] == "a"
    before = MegatronCheckpoint(parent).read(FC1, SHARED_EXPERT)
    assert torch.equal(MegatronCheckpoint(output).read(FC1, SHARED_EXPERT), before)
    alone = replace(options, parent=None, shared="b", output=tmp_path / "without", keep="50%")
    # of layer 1's experts four are kept, 2 among them
    with pytest.raises(ValueError, match=r"--conflict a does not have expert 2 of layer 1"):
        compose.run(alone)
    with pytest.raises(ValueError, match=r"--router .*a does not have expert 2 of layer 1"):
        compose.run(replace(alone, conflict="average", router="a"))
    assert not (tmp_path / "without").exists()


def test_a_module_of_another_parent_is_refused(ranks, parent, modules, tmp_path):
    other = tmp_path / "other"
    ranks(1).run(checkpoints.save, folder=str(other), layout={}, config={}, seed=6)
    stranger = _module(other, tmp_path / "stranger", SECOND)
    options = merge.Options(parent=parent, modules=(modules[0], stranger), output=tmp_path / "new", conflict="one")
    with pytest.raises(ValueError, match=r"stranger is a module of another parent: .*fingerprint"):
        merge.run(options)
    assert not (tmp_path / "new").exists()


def _stats(parent, folder):
    """Statistics of two data sets, in which expert 5 is next in line."""
    checkpoint = MegatronCheckpoint(parent)
    metadata = replace(experts.METADATA, fingerprint=checkpoint.fingerprint, layers=checkpoint.moe_layers)
    scores = torch.tensor([3.0, 3, 3, 3, 3, 2, 1, 1], dtype=torch.float64).expand(2, -1).clone()
    none = torch.zeros(2, 8, dtype=torch.int64)
    stats = ExpertStatistics(
        model=metadata,
        num_documents=1,
        num_tokens=20,
        probability_LE=scores,
        count_LE=none,
        coactivation_LEE=torch.zeros(2, 8, 8, dtype=torch.int64),
    )
    path = stats.save(folder / "stats.safetensors")
    return path, path


def test_composition_takes_experts_from_their_owners(ranks, parent, modules, tmp_path):
    output = compose.run(
        compose.Options(
            modules=modules,
            parent=parent,
            output=tmp_path / "both",
            conflict="two",
            keep="100%",
            stats=_stats(parent, tmp_path),
        )
    )
    before, after = MegatronCheckpoint(parent), MegatronCheckpoint(output)
    residual_change_E = (after.read(FC1) - before.read(FC1)).mean((1, 2))
    # expert 5 is in neither module: the parent's; 2 is in both: the second's
    torch.testing.assert_close(residual_change_E, torch.tensor([2.0, 1, 2, 2, 2, 0, 1, 1]))
    # the shared weights are the parent's: what the second module did to them is listed
    assert torch.equal(after.read(ATTENTION), before.read(ATTENTION))
    assert ATTENTION in {row["weight"] for row in checkpoints.report(output)["left_out"]}
    assert load_selection(output / "selection.json").num_kept == (8, 8)
    (logits,) = ranks(1).run(checkpoints.logits, folder=str(output), layout={}, config={}, stock=True)
    assert logits.isfinite().all()


def test_composed_selections_are_a_file(parent, tmp_path, capsys):
    paths = [
        selection_of(parent, kept).save(tmp_path / f"{number}.json")
        for number, kept in enumerate((FIRST, [FIRST[0], SECOND[1]]))
    ]
    stats = _stats(parent, tmp_path)
    command = ["compose", "--selections", *paths, "--stats", *stats, "--keep", "4 routed"]
    command = [str(a) for a in [*command, "--output", tmp_path / "both.json"]]
    assert main(command) == 0
    # of the second layer's eight the best four by score, ties to the lower number
    assert load_selection(tmp_path / "both.json").experts == ((1, 2, 6, 7), (0, 1, 2, 3))
    assert main(command) == 2
    assert "both.json exists" in capsys.readouterr().err


def test_refusals(parent, modules, tmp_path, capsys):
    def refused(match, function, options):
        with pytest.raises(ValueError, match=match):
            function(options)
        assert not (tmp_path / "new").exists()

    def merging(**changes):
        fields = {"parent": parent, "modules": modules[:1], "output": tmp_path / "new"}
        return merge.run, merge.Options(**fields | changes)

    def composing(**changes):
        fields = {"modules": modules, "output": tmp_path / "new", "conflict": "average"}
        stats = {"stats": _stats(parent, tmp_path), "keep": "7 routed"}
        return compose.run, compose.Options(**fields | stats | changes)

    for blend in (math.nan, math.inf, 0.0):
        refused("--blend", *merging(blend=blend))
    refused("--conflict", *merging(conflict="no"))
    refused("--weights all", *merging(modules=modules, weights="all"))
    refused("selection.json .*--selections", *merging(modules=(MegatronCheckpoint(parent).path,)))
    wrong = selection_of(parent, [SECOND[0], [0, 1, 2]]).save(tmp_path / "wrong.json")
    refused("--keep", *merging(selections=(wrong,)))
    small = selection_of(parent, [[0, 1], [2, 3]]).save(tmp_path / "small.json")
    refused("--selections", *merging(selections=(small,)))
    refused("--selections", *merging(selections=(small, small)))
    refused("--parent", *composing())
    stats = _stats(parent, tmp_path)
    refused("--stats", *composing(stats=(*stats, stats[0])))
    refused("expert 5 of layer 1.*--parent", *composing(shared="one", keep="8 routed"))
    refused("--keep", *composing(keep="1 routed"))
    refused("--stats", *composing(modules=(), selections=(small,), stats=()))
    named = shutil.copytree(modules[0], tmp_path / "average")
    refused("--modules .*average", *merging(modules=(named,)))
    refused("exists", *merging(output=modules[0]))
    assert main(["merge", "--parent", "x", "--modules", "y", "--output", str(tmp_path / "new")]) == 2
    assert "error: " in capsys.readouterr().err
