"""A module cut out of a checkpoint is the full model limited to its experts, in stock Megatron, under any layout."""

from __future__ import annotations

import shutil

import pytest
import torch
from support import checkpoints
from support.checkpoints import selection_of

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.cli import main
from emo_megatron.commands import compose, extract
from emo_megatron.experts.selection import load_selection

KEPT = [[1, 2, 6, 7], [0, 3, 4, 6]]


@pytest.fixture(scope="module")
def parent(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract") / "parent"
    ranks(2).run(checkpoints.save, folder=str(folder), layout={"expert_model_parallel_size": 2}, config={})
    return folder


@pytest.fixture(scope="module")
def module(parent):
    selection = selection_of(parent, KEPT).save(parent.parent / "kept.json")
    output = parent.parent / "module"
    return extract.run(extract.Options(checkpoint=parent, selection=selection, output=output))


def test_slices_are_the_same_bits(parent, module):
    before, after = MegatronCheckpoint(parent), MegatronCheckpoint(module)
    assert list(after.names) == list(before.names)
    for name, info in after.names.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0
        of_experts = ".mlp.experts." in name or ".mlp.router." in name
        wanted = before.read(name, KEPT[layer] if of_experts else None)
        assert info.shape == tuple(wanted.shape)
        assert torch.equal(after.read(name), wanted)
    assert after.args.num_experts == 4
    # pools were counted in the parent's experts
    assert (before.args.pool_min, after.args.pool_min) == (3, None)
    assert load_selection(module / "selection.json").experts == tuple(map(tuple, KEPT))


@pytest.mark.parametrize(
    ("layout", "stock"),
    [
        ({}, False),
        ({"expert_model_parallel_size": 2}, True),
        ({"pipeline_model_parallel_size": 2}, True),
        # Megatron's norm for a CPU refuses the sequence parallelism that comes with this
        ({"tensor_model_parallel_size": 2}, False),
    ],
    ids=["single", "stock EP2", "stock PP2", "TP2"],
)
def test_logits_are_the_limited_models(ranks, parent, module, layout, stock):
    allowed = selection_of(parent, KEPT).keep_mask()
    (wanted,) = ranks(1).run(checkpoints.logits, folder=str(parent), layout={}, config={}, allowed=allowed.tolist())
    found = ranks(2 if layout else 1).run(
        checkpoints.logits, folder=str(module), layout=layout, config={"num_moe_experts": 4}, stock=stock
    )
    for logits in (answer for answer in found if answer is not None):
        # the limited model runs this project's norm and attention, the stock one Megatron's
        assert (logits - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_the_full_model_says_something_else(ranks, parent, module):
    """Or the parity above would show nothing."""
    full, cut = (
        ranks(1).run(checkpoints.logits, folder=str(folder), layout={}, config=config)[0]
        for folder, config in ((parent, {}), (module, {"num_moe_experts": 4}))
    )
    assert (full - cut).abs().max() > 1e-2


def test_a_module_has_no_groups(ranks, tmp_path):
    # of two experts that one group holds both, or one
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 1}
    parent = tmp_path / "parent"
    ranks(1).run(checkpoints.save, folder=str(parent), layout={}, config=groups)
    selection = selection_of(parent, KEPT)
    module = extract.run(
        extract.Options(checkpoint=parent, selection=selection.save(tmp_path / "kept.json"), output=tmp_path / "module")
    )
    args = MegatronCheckpoint(module).args
    assert (args.moe_router_num_groups, args.moe_router_group_topk) == (None, None)
    (limited,) = ranks(1).run(
        checkpoints.logits, folder=str(parent), layout={}, config=groups, allowed=selection.keep_mask().tolist()
    )
    (cut,) = ranks(1).run(checkpoints.logits, folder=str(module), layout={}, config={"num_moe_experts": 4})
    assert (cut - limited).abs().max() <= 1e-6 * limited.abs().max()
    # modules that are the whole model again have its groups again, without the parent to ask
    others = [sorted(set(range(8)) - set(experts)) for experts in KEPT]
    rest = extract.run(
        extract.Options(
            checkpoint=parent,
            selection=selection_of(parent, others).save(tmp_path / "others.json"),
            output=tmp_path / "rest",
        )
    )
    options = compose.Options(output=tmp_path / "whole", modules=(module, rest), shared="module")
    compose.run(options)
    whole = MegatronCheckpoint(tmp_path / "whole").args
    assert whole.num_experts == 8
    assert {name: getattr(whole, name) for name in groups} == groups


def test_refusals(parent, module, tmp_path, capsys):
    def refused(match, *, checkpoint=parent, output=tmp_path / "new", **changes):
        kept = changes.pop("kept", KEPT)
        selection = selection_of(parent, kept, **changes).save(tmp_path / "s.json")
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            extract.run(extract.Options(checkpoint=checkpoint, selection=selection, output=output))
        assert not (tmp_path / "new").exists()

    refused("another model.*routers", model="0" * 64)
    refused("another model.*16", num_experts=16)
    refused("another model.*layers", layers=(2, 3))
    refused("--keep", kept=[[0, 1], [0, 1, 2]])
    refused("--moe-router-topk", kept=[[0], [1]])
    refused("exists", output=module)
    refused("must hold a checkpoint", checkpoint=tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(parent, broken)
    next(broken.glob("iter*/__1_*.distcp")).unlink()
    refused("distcp", checkpoint=broken)
    assert main(["extract", "--checkpoint", "x", "--selection", "y", "--output", "z"]) == 2
    assert "error: " in capsys.readouterr().err
