"""A reordered checkpoint is the same model under every dispatcher, and what would make another model is refused."""

from __future__ import annotations

import argparse

import pytest
import torch
from support import checkpoints
from support.checkpoints import BIASED, ORDER, placement_of

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.cli import main
from emo_megatron.commands import reorder
from emo_megatron.experts.placement import load_placement


@pytest.fixture(scope="module")
def before(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reorder") / "before"
    layout = {"expert_model_parallel_size": 2}
    ranks(2).run(checkpoints.save, folder=str(folder), layout=layout, config=BIASED)
    return folder


@pytest.fixture(scope="module")
def after(before):
    placement = placement_of(before).save(before.parent / "p.json")
    output = before.parent / "after"
    command = ["reorder", "--checkpoint", str(before), "--placement", str(placement)]
    assert main([*command, "--output", str(output)]) == 0
    return output


def test_experts_and_router_rows_move_together_and_nothing_else(before, after):
    old, new = MegatronCheckpoint(before), MegatronCheckpoint(after)
    assert list(old.names) == list(new.names)
    assert old.read("decoder.layers.0.mlp.router.expert_bias").unique().numel() == 8
    for name in old.names:
        of_experts = ".mlp.experts." in name or ".mlp.router." in name
        order = list(ORDER[int(name.split(".")[2])]) if of_experts else None
        assert torch.equal(new.read(name), old.read(name, order)), name
    assert new.args.num_experts == 8
    assert new.args.pool_min == 3
    assert load_placement(after / "placement.json").order == ORDER


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather", "dedup"])
def test_the_model_is_the_same(ranks, before, after, dispatcher):
    layout = {"expert_model_parallel_size": 2}
    wanted, found = (
        ranks(2).run(_logits, folder=str(folder), layout=layout, dispatcher=dispatcher) for folder in (before, after)
    )
    for logits, want in zip(found, wanted, strict=True):
        assert (logits - want).abs().max() <= 1e-6 * want.abs().max()


def _logits(folder, layout, dispatcher):
    from support import tiny

    from emo_megatron.config import PoolConfig

    tiny.setup(expert_tensor_parallel_size=1, **layout)
    is_dedup = dispatcher == "dedup"
    pool = PoolConfig(pool_dispatcher="dedup") if is_dedup else PoolConfig()
    host = "alltoall" if is_dedup else dispatcher
    built = tiny.model(pool, moe_token_dispatcher_type=host, **BIASED)
    checkpoints.load(folder, built)
    return checkpoints.forward(built.eval())


def test_another_models_placement_is_refused(before, tmp_path, capsys):
    placement = placement_of(before, model="0" * 64).save(tmp_path / "p.json")
    output = tmp_path / "out"
    command = ["reorder", "--checkpoint", str(before), "--placement", str(placement)]
    assert main([*command, "--output", str(output)]) == 2
    assert "another model" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(("name", "value"), [("pool_forced", 1), ("moe_router_num_groups", 2)])
def test_numbers_that_mean_something_are_refused(before, tmp_path, monkeypatch, name, value):
    stored = MegatronCheckpoint(before).args
    changed = argparse.Namespace(**vars(stored) | {name: value})
    monkeypatch.setattr(MegatronCheckpoint, "args", changed)
    placement = placement_of(before).save(tmp_path / "p.json")
    options = reorder.Options(checkpoint=before, placement=placement, output=tmp_path / "out")
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        reorder.run(options)
    assert not options.output.exists()
