"""Layers of multi-token prediction in a checkpoint: names, numbers, and modules that keep these layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import checkpoints
from support.checkpoints import placement_of, selection_of

from emo_megatron.checkpoint.names import count_layers, is_of_experts, pieces_of, split_name
from emo_megatron.checkpoint.reader import MegatronCheckpoint, metadata_of
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.commands import compose, extract, merge, reorder
from emo_megatron.experts.selection import load_selection, router_fingerprint

CONFIG = {"mtp_num_layers": 2}
REPEATED = CONFIG | {"mtp_use_repeated_layer": True}
KEPT = [[1, 2, 6, 7], [0, 3, 4, 6], [0, 1, 4, 5], [2, 3, 5, 7]]
REST = [sorted(set(range(8)) - set(kept)) for kept in KEPT]
ROUTERS = [f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)]
ROUTERS += [f"mtp.layers.{depth}.transformer_layer.mlp.router.weight" for depth in (0, 1)]
FC1 = "mtp.layers.1.transformer_layer.mlp.experts.experts.linear_fc1.weight"


def _saved(ranks, folder, config, *, world=1, **options):
    answers = ranks(world).run(checkpoints.save, folder=str(folder), config=config, **{"layout": {}} | options)
    return folder, answers[0]


@pytest.fixture(scope="module")
def parent(ranks, tmp_path_factory):
    return _saved(ranks, tmp_path_factory.mktemp("prediction") / "parent", CONFIG)


@pytest.fixture(scope="module")
def repeated(ranks, tmp_path_factory):
    """One layer for both depths."""
    return _saved(ranks, tmp_path_factory.mktemp("repeated") / "parent", REPEATED)


def _layer(name):
    """From 0, as in KEPT; None outside of layers."""
    if ".mlp.router." not in name and ".mlp.experts." not in name:
        return None
    return int(name.split(".")[2]) + (2 if name.startswith("mtp.") else 0)


def test_names_and_numbers(parent, repeated):
    folder, weights = parent
    reader = MegatronCheckpoint(folder)
    assert set(reader.names) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(reader.read(name), weight), name
    assert (reader.num_layers, reader.moe_layers, reader.prediction_layers) == (2, (1, 2, 3, 4), (3, 4))
    assert reader.fingerprint == router_fingerprint(weights[name] for name in ROUTERS)
    assert {reader.layer_of(name) for name in weights} == {0, 1, 2, 3, 4}
    assert reader.layer_of(FC1) == 4
    one = MegatronCheckpoint(repeated[0])
    assert (one.moe_layers, one.prediction_layers) == ((1, 2, 3), (3,))
    assert one.fingerprint == router_fingerprint(repeated[1][name] for name in ROUTERS[:3])


def test_one_set_of_names_under_any_layout(ranks, parent, tmp_path):
    folder, weights = parent
    layout = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    again, _ = _saved(ranks, tmp_path / "again", CONFIG, world=2, layout=layout, singletons=True, source=str(folder))
    reader = MegatronCheckpoint(again)
    assert set(reader.names) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(reader.read(name), weight), name


def test_names_of_other_writers():
    """Hybrid models store a stack of layers per depth; experts and halves of a projection may be stored one by one."""
    stem = "mtp.layers.1.mtp_model_layer.layers.1.mlp."
    stored = {f"{stem}experts.experts.{expert}.linear_fc1.weight_{half}": (4, 3) for expert in (0, 1) for half in "wv"}
    pieces = pieces_of(stored)
    assert list(pieces) == [f"{stem}experts.experts.linear_fc1.weight"]
    boxes = [piece.offset for piece in pieces[f"{stem}experts.experts.linear_fc1.weight"]]
    assert boxes == [(0, 0, 0), (0, 4, 0), (1, 0, 0), (1, 4, 0)]
    assert split_name(f"{stem}router.weight", num_layers=7) == (9, "mlp.router.weight")
    assert is_of_experts(f"{stem}router.expert_bias")
    assert split_name("mtp.layers.1.eh_proj.weight", num_layers=7) == (0, "mtp.layers.1.eh_proj.weight")
    assert count_layers([f"{stem}router.weight", "decoder.layers.6.mlp.router.weight", "output_layer.weight"]) == 7


def test_sizes_count_every_layer(parent):
    folder, weights = parent
    metadata = metadata_of(MegatronCheckpoint(folder))
    one_expert = 32 * 32 + 32 * 16 + 32
    assert metadata.layers == (1, 2, 3, 4)
    assert metadata.expert_parameters == one_expert
    assert metadata.other_parameters == sum(w.numel() for w in weights.values()) - 4 * 8 * one_expert


def _extracted(parent, output, kept=KEPT):
    selection = selection_of(parent, kept).save(output.with_suffix(".json"))
    return extract.run(extract.Options(checkpoint=parent, selection=selection, output=output))


@pytest.fixture(scope="module")
def module(parent):
    return _extracted(parent[0], parent[0].parent / "module")


def test_a_module_keeps_its_layers(parent, module):
    _, weights = parent
    after = MegatronCheckpoint(module)
    assert set(after.names) == set(weights)
    for name, weight in weights.items():
        layer = _layer(name)
        assert torch.equal(after.read(name), weight if layer is None else weight[KEPT[layer]]), name
    assert after.args.num_experts == 4
    assert (after.moe_layers, after.args.mtp_num_layers) == ((1, 2, 3, 4), 2)


@pytest.mark.parametrize("stock", [False, True])
def test_predictions_of_a_module_are_those_of_the_limited_parent(ranks, parent, module, stock):
    folder, _ = parent
    allowed = selection_of(folder, KEPT).keep_mask().tolist()
    (limited,) = ranks(1).run(checkpoints.head_logits, folder=str(folder), layout={}, config=CONFIG, allowed=allowed)
    (full,) = ranks(1).run(checkpoints.head_logits, folder=str(folder), layout={}, config=CONFIG)
    config = CONFIG | {"num_moe_experts": 4}
    (found,) = ranks(1).run(checkpoints.head_logits, folder=str(module), layout={}, config=config, stock=stock)
    assert found.shape[0] == 3
    for head, want, whole in zip(found, limited, full, strict=True):
        assert (head - want).abs().max() <= 1e-6 * want.abs().max()
        assert (whole - want).abs().max() > 1e-2, "or the comparison would show nothing"


def test_one_layer_for_all_depths_has_one_row(ranks, repeated, tmp_path):
    folder, _ = repeated
    cut = _extracted(folder, tmp_path / "cut", KEPT[:3])
    allowed = selection_of(folder, KEPT[:3]).keep_mask().tolist()
    (limited,) = ranks(1).run(checkpoints.head_logits, folder=str(folder), layout={}, config=REPEATED, allowed=allowed)
    config = REPEATED | {"num_moe_experts": 4}
    (found,) = ranks(1).run(checkpoints.head_logits, folder=str(cut), layout={}, config=config)
    assert (found - limited).abs().max() <= 1e-6 * limited.abs().max()


def test_trained_layers_go_back(parent, module, tmp_path):
    folder, weights = parent
    cut = MegatronCheckpoint(module)
    changed = {name: cut.read(name) + (".mlp.experts." in name) for name in cut.names}
    notes = {"selection.json": load_selection(module / "selection.json").save}
    trained = write_checkpoint(tmp_path / "trained", changed, args=cut.args, notes=notes)
    merged = MegatronCheckpoint(merge.run(merge.Options(parent=folder, modules=(trained,), output=tmp_path / "merged")))
    for name, weight in weights.items():
        wanted = weight.clone()
        if ".mlp.experts." in name:
            wanted[KEPT[_layer(name)]] += 1
        assert torch.equal(merged.read(name), wanted), name
    report = checkpoints.report(tmp_path / "merged")
    assert report["changed"]["mlp.experts.experts.linear_fc1.weight"] == 16
    assert not report["conflicts"]


def test_modules_are_the_whole_again(parent, module, tmp_path):
    _, weights = parent
    rest = _extracted(parent[0], tmp_path / "rest", REST)
    whole = MegatronCheckpoint(
        compose.run(compose.Options(output=tmp_path / "whole", modules=(module, rest), shared="module"))
    )
    for name, weight in weights.items():
        assert torch.equal(whole.read(name), weight), name


def test_a_new_order_is_the_same_model(ranks, parent, tmp_path):
    folder, weights = parent
    order = tuple(tuple((place * 3 + layer) % 8 for place in range(8)) for layer in range(4))
    placement = placement_of(folder, order=order).save(tmp_path / "p.json")
    after = reorder.run(reorder.Options(checkpoint=folder, placement=placement, output=tmp_path / "after"))
    assert torch.equal(MegatronCheckpoint(after).read(FC1), weights[FC1][list(order[3])])
    was, now = (
        ranks(1).run(checkpoints.head_logits, folder=str(path), layout={}, config=CONFIG)[0] for path in (folder, after)
    )
    assert (now - was).abs().max() <= 1e-6 * was.abs().max()


def test_a_selection_must_name_the_layers_that_the_model_has(ranks, parent, tmp_path):
    folder, _ = parent
    plain, _ = _saved(ranks, tmp_path / "plain", {})
    without = selection_of(plain, KEPT[:2])
    both = selection_of(folder, KEPT)
    file = tmp_path / "s.json"
    for checkpoint, selection, told in (
        (folder, without, r"s\.json.*parent.*\[3, 4\] are layers of multi-token prediction.*run stats and select"),
        (plain, both, r"s\.json.*plain.*\[3, 4\] are layers of multi-token prediction.*run stats and select"),
        # no layer is missing: another model
        (folder, replace(both, model="0" * 64), r"s\.json.*fingerprint"),
    ):
        selection.save(file)
        with pytest.raises(ValueError, match=told) as error:
            extract.run(extract.Options(checkpoint=checkpoint, selection=file, output=tmp_path / "new"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "new").exists()
