"""Weights placed while they are loaded are those of the relabelled checkpoint; a run that cannot place is refused."""

from __future__ import annotations

import argparse

import pytest
import torch
from support import checkpoints, pretraining

from emo_megatron.mcore.placement import placement_hook
from emo_megatron.mcore.relabel import RelabelOptions, relabel
from emo_megatron.mcore.weights import MegatronCheckpoint
from emo_megatron.modules.placement import Placement
from emo_megatron.modules.selection import router_fingerprint

ORDER = ((3, 0, 7, 4, 1, 2, 6, 5), (7, 6, 5, 4, 3, 2, 1, 0))
LAYOUT = {"expert_model_parallel_size": 2}


def _placement_of(folder, order):
    model = MegatronCheckpoint(folder)
    routers = [model.layer_view(n).read("mlp.router.weight") for n in model.moe_layers]
    return Placement(
        num_experts=8,
        num_ranks=2,
        layers=model.moe_layers,
        order=order,
        model=router_fingerprint(routers),
        method="together",
        max_imbalance=1.1,
    )


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """Folder of a checkpoint and the file of a placement of its experts."""
    folder = tmp_path_factory.mktemp("placement") / "run"
    ranks(2).run(checkpoints.save, folder=str(folder), layout=LAYOUT, config={})
    placement = _placement_of(folder, ORDER)
    return folder, placement.save(folder.parent / "p.json")


def _weights(folder, placement=None):
    """This rank's weights after loading."""
    from emo_megatron.mcore.placement import place_when_loaded
    from emo_megatron.modules.placement import load_placement

    built = checkpoints.model({}, layout=LAYOUT, seed=6)
    if placement is not None:
        place_when_loaded(built, load_placement(placement))
    checkpoints.load(folder, built)
    return {name: p.detach().clone() for name, p in built.named_parameters()}


def test_loading_places_as_relabelling_does(ranks, run):
    folder, placement = run
    output = folder.parent / "relabelled"
    relabel(RelabelOptions(checkpoint=folder, placement=placement, output=output))
    placed = ranks(2).run(_weights, folder=str(folder), placement=placement)
    wanted = ranks(2).run(_weights, folder=str(output))
    before = ranks(2).run(_weights, folder=str(folder))
    for got, want, old in zip(placed, wanted, before, strict=True):
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name
        assert any(not torch.equal(old[name], tensor) for name, tensor in want.items())


def _args(run, **changes):
    flags = {
        "expert_placement": run[1],
        "load": str(run[0]),
        "finetune": True,
        "pretrained_checkpoint": None,
        "expert_model_parallel_size": 2,
    }
    return argparse.Namespace(**flags | changes)


def test_only_a_run_that_starts_from_weights_places(run):
    assert placement_hook(_args(run, expert_placement=None)) is None
    assert placement_hook(_args(run)) is not None
    assert placement_hook(_args(run, finetune=False, pretrained_checkpoint=str(run[0]))) is not None
    with pytest.raises(ValueError, match="--finetune"):
        placement_hook(_args(run, finetune=False))
    with pytest.raises(ValueError, match="is for 2 ranks; got --expert-model-parallel-size 4"):
        placement_hook(_args(run, expert_model_parallel_size=4))


@pytest.mark.slow
def test_a_placed_run_trains_as_the_run_it_comes_from(tmp_path, data_prefix):
    """With the distributed optimizer, which must step from the placed weights."""
    pools = ("--pool-min", 3, "--save-interval", 1)
    first = tmp_path / "first"
    pretraining.pretrain(1, *pools, "--train-iters", 1, "--save", first, data=data_prefix)
    placement = _placement_of(first, (*ORDER, ORDER[0])).save(tmp_path / "p.json")
    going_on = (
        *(*pools, "--train-iters", 2, "--load", first, "--finetune"),
        *("--use-distributed-optimizer", "--expert-model-parallel-size", 2),
    )
    losses, saved = {}, {}
    for name, flags in {
        "stock": (),
        "placed": ("--expert-placement", placement, "--pool-dispatcher", "dedup"),
    }.items():
        saved[name] = tmp_path / name
        output = pretraining.pretrain(2, *going_on, "--save", saved[name], *flags, data=data_prefix)
        losses[name] = pretraining.logged(output)
    assert len(losses["stock"]) == 2
    assert losses["placed"] == pytest.approx(losses["stock"], rel=1e-5)
    old, new = (MegatronCheckpoint(saved[name]) for name in ("stock", "placed"))
    for number, order in zip(old.moe_layers, (*ORDER, ORDER[0]), strict=True):
        want = old.layer_view(number).read("mlp.router.weight", order)
        got = new.layer_view(number).read("mlp.router.weight")
        assert (got - want).norm() < 1e-4 * want.norm()
