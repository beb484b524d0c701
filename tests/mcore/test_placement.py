"""Weights placed while they are loaded are those of the reordered checkpoint; a run that cannot place is refused."""

from __future__ import annotations

import pytest
import torch
from support import checkpoints, pretraining
from support.checkpoints import BIASED, ORDER, placement_of

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.source import check_router
from emo_megatron.commands import reorder
from emo_megatron.experts.placement import load_placement
from emo_megatron.mcore.finetune import place_when_loaded

LAYOUT = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """Folder of a checkpoint and the file of a placement of its experts."""
    folder = tmp_path_factory.mktemp("placement") / "run"
    ranks(2).run(checkpoints.save, folder=str(folder), layout=LAYOUT, config=BIASED)
    return folder, placement_of(folder).save(folder.parent / "p.json")


def _orders(file):
    placement = load_placement(file)
    return dict(zip(placement.layers, placement.order, strict=True))


def _weights(folder, placement=None):
    """This rank's weights after loading."""
    built = checkpoints.model(BIASED, layout=LAYOUT, seed=6)
    if placement is not None:
        place_when_loaded(built, _orders(placement))
    checkpoints.load(folder, built)
    found = (*built.named_parameters(), *built.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in found}


def test_loading_places_as_reordering_does(ranks, run):
    folder, placement = run
    output = folder.parent / "reordered"
    reorder.run(reorder.Options(checkpoint=folder, placement=placement, output=output))
    placed = ranks(2).run(_weights, folder=str(folder), placement=placement)
    wanted = ranks(2).run(_weights, folder=str(output))
    before = ranks(2).run(_weights, folder=str(folder))
    for got, want, old in zip(placed, wanted, before, strict=True):
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(got[name], tensor), name
            if name.endswith((".router.weight", ".router.expert_bias")):
                assert not torch.equal(old[name], tensor), name
        assert sum(name.endswith(".router.expert_bias") for name in want) == 2
        assert any(not torch.equal(old[name], tensor) for name, tensor in want.items())


def _wrong_loads(folder, placement):
    """What a placed model says that nothing was loaded into, then when weights come a second time."""
    said = []
    built = checkpoints.model(BIASED, layout=LAYOUT, seed=6).eval()
    place_when_loaded(built, _orders(placement))
    steps = (
        lambda: checkpoints.forward(built),
        lambda: checkpoints.load(folder, built),
        lambda: checkpoints.forward(built),
        lambda: checkpoints.load(folder, built),
    )
    for step in steps:
        try:
            step()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_weights_that_did_not_come_once_are_refused(ranks, run):
    folder, placement = run
    for never, *fine, twice in ranks(2).run(_wrong_loads, folder=str(folder), placement=placement):
        assert "placed nothing" in never
        assert fine == ["", ""]
        assert "loaded twice" in twice


def _loads_another(folder, placement, source):
    """What a placed model says when the weights of another model come."""
    built = checkpoints.model(BIASED, layout=LAYOUT, seed=6).eval()
    source = MegatronCheckpoint(source)
    place_when_loaded(built, _orders(placement), check=lambda layer: check_router(layer, source))
    try:
        checkpoints.load(folder, built)
    except ValueError as error:
        return str(error)
    return ""


def test_only_the_weights_that_were_checked_are_placed(ranks, run, tmp_path):
    folder, placement = run
    other = tmp_path / "other"
    ranks(2).run(checkpoints.save, folder=str(other), layout=LAYOUT, config=BIASED, seed=9)
    given = {"placement": placement, "source": str(folder)}
    assert ranks(2).run(_loads_another, folder=str(folder), **given) == ["", ""]
    for said in ranks(2).run(_loads_another, folder=str(other), **given):
        assert f"did not load {folder}" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [((), torch.float32), (("--bf16",), torch.bfloat16), (("--fp16", "--loss-scale", 1024), torch.float16)],
    ids=["fp32", "bf16", "fp16"],
)
def test_a_placed_run_trains_as_the_run_it_comes_from(tmp_path, data_prefix, precision, dtype):
    """With the distributed optimizer, which must step from the placed weights, or from its float32 copies of them."""
    flags = (*precision, "--pool-min", 3, "--save-interval", 1)
    first = tmp_path / "first"
    pretraining.pretrain(1, *flags, "--train-iters", 1, "--save", first, data=data_prefix)
    orders = (*ORDER, ORDER[0])
    placement = placement_of(first, order=orders).save(tmp_path / "p.json")
    going_on = (
        *(*flags, "--train-iters", 3, "--load", first, "--finetune"),
        *("--use-distributed-optimizer", "--expert-model-parallel-size", 2),
    )
    losses, saved, eps = {}, {}, torch.finfo(dtype).eps
    for name, others in {
        "stock": (),
        "placed": ("--expert-placement", placement, "--pool-dispatcher", "dedup"),
    }.items():
        saved[name] = tmp_path / name
        output = pretraining.pretrain(2, *going_on, "--save", saved[name], *others, data=data_prefix)
        losses[name] = pretraining.logged(output)
    assert len(losses["stock"]) == 3
    assert losses["placed"] == pytest.approx(losses["stock"], rel=max(eps / 16, 1e-5))
    start, old, new = map(MegatronCheckpoint, (first, saved["stock"], saved["placed"]))
    for number, order in zip(old.moe_layers, orders, strict=True):
        for weight in ("router.weight", "experts.experts.linear_fc1.weight"):
            name = f"decoder.layers.{number - 1}.mlp.{weight}"
            before, want = (model.read(name, order).float() for model in (start, old))
            got = new.read(name).float()
            near = max(eps, 1e-4) * want.norm()
            assert (got - want).norm() < near
            # what was loaded has been trained
            assert (before - want).norm() > 4 * near


@pytest.mark.slow
def test_the_same_command_goes_on_with_placed_experts(tmp_path, data_prefix):
    """Started from --pretrained-checkpoint, then again from its own: experts are placed once."""
    pools = ("--pool-min", 3, "--save-interval", 1)
    first = tmp_path / "first"
    pretraining.pretrain(1, *pools, "--train-iters", 1, "--save", first, data=data_prefix)
    orders = (*ORDER, ORDER[0])
    placement = placement_of(first, order=orders).save(tmp_path / "p.json")
    placed, stop = ("--expert-placement", placement), ("--exit-interval", 1)
    saved = {}
    for name, calls in (("stock", [()]), ("placed", [(*placed, *stop), placed])):
        saved[name] = tmp_path / name
        for flags in calls:
            pretraining.pretrain(
                *(2, *pools, "--expert-model-parallel-size", 2, "--pretrained-checkpoint", first),
                *("--load", saved[name], "--save", saved[name], "--train-iters", 2, *flags),
                data=data_prefix,
            )
        assert (saved[name] / "iter_0000002").is_dir()
    old, new = (MegatronCheckpoint(saved[name]) for name in ("stock", "placed"))
    for number, order in zip(old.moe_layers, orders, strict=True):
        name = f"decoder.layers.{number - 1}.mlp.router.weight"
        want, got = old.read(name, order), new.read(name)
        assert (got - want).norm() < 1e-4 * want.norm()
