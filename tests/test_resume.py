"""Runs that stop and go on: killed, under another layout, with other pools, from and to Megatron's stock layers."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from support.pretraining import logged, pretrain, scalars, start, stop, stored_tensors

STOCK = Path(__file__).parent / "support" / "pretrain_stock.py"
POOLS = ("--pool-min", 3)
TORCH_DIST = ("--ckpt-format", "torch_dist")
# the one optimizer format that goes from layout to layout; the other stores what lies between its tensors too, which
# nobody initialised, so two equal runs differ in it
RESHARDABLE = (*TORCH_DIST, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


def _model(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in stored_tensors(checkpoint).items() if "optim" not in k}


def _different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if not torch.equal(value, other[key])]


@pytest.fixture(scope="session")
def trained(data_prefix, tmp_path_factory):
    """A run with pools of two steps under TP2, and its third step uninterrupted."""
    folder = tmp_path_factory.mktemp("trained")
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    output = pretrain(
        2,
        *(*POOLS, *RESHARDABLE, *layout, "--train-iters", 3),
        *("--save", folder, "--save-interval", 2),
        data=data_prefix,
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder, logged(output)


@pytest.mark.slow
def test_a_killed_rank_costs_nothing_but_time(data_prefix, tmp_path):
    flags = [*POOLS, *RESHARDABLE, "--expert-model-parallel-size", 2]
    flags += ["--train-iters", 6, "--save-interval", 2]

    def folders(name):
        return ["--save", tmp_path / name, "--tensorboard-dir", tmp_path / name / "tb"]

    pretrain(2, *flags, *folders("whole"), data=data_prefix)
    killed = start(2, *flags, *folders("parts"), data=data_prefix)
    try:
        for line in killed.stdout:
            if re.search(r"iteration\s+3/", line):
                os.kill(_rank(killed.pid, 1), signal.SIGKILL)
                break
        assert killed.wait(timeout=120) != 0
    finally:
        stop(killed)
    tracker = tmp_path / "parts" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2", "killed after the first checkpoint and before the second"
    pretrain(2, *flags, *folders("parts"), "--load", tmp_path / "parts", data=data_prefix)

    losses = scalars(tmp_path / "whole" / "tb")
    assert len(losses) == 6
    assert scalars(tmp_path / "parts" / "tb") == losses
    last = "iter_0000006"
    wanted, found = (stored_tensors(tmp_path / name / last) for name in ("whole", "parts"))
    assert _different(wanted, found) == []


def _rank(launcher: int, rank: int) -> int:
    """Process id of a rank that this torchrun started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return child
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        # beginning earlier than these steps, which changes nothing of them, is not what the run was told
        (1, ["--pool-delay-samples", 8, "--override-pool-config"]),
        # with expert parallelism Megatron has an optimizer more, and refuses to load one into two
        (2, ["--expert-model-parallel-size", 2, "--no-load-optim"]),
        pytest.param(2, ["--pipeline-model-parallel-size", 2], marks=pytest.mark.slow),
    ],
    ids=["single", "EP2", "PP2"],
)
def test_a_run_goes_on_under_another_layout(trained, data_prefix, processes, layout):
    folder, losses = trained
    flags = [*POOLS, *RESHARDABLE, *layout, "--train-iters", 3, "--load", folder]
    output = pretrain(processes, *flags, data=data_prefix)
    assert logged(output) == pytest.approx(losses[2:], rel=1e-5)


def test_other_pools_are_refused_unless_asked_for(trained, data_prefix):
    folder, _ = trained
    changed = ("--pool-min", 3, "--pool-delay-samples", 8)
    output = pretrain(1, *changed, *RESHARDABLE, "--load", folder, data=data_prefix, expect_failure=True)
    assert "--pool-delay-samples was" in output
    assert "--override-pool-config" in output
    assert "number of parameters" not in output, "refused before anything was built"


def test_a_pool_trained_checkpoint_loads_in_stock_megatron_and_back(trained, data_prefix, tmp_path):
    folder, _ = trained
    # a step that moves nothing: what is stored is what was loaded
    still = [*TORCH_DIST, "--micro-batch-size", 1, "--lr", 0, "--min-lr", 0, "--train-iters", 1]
    still += ["--finetune", "--no-load-optim", "--save-interval", 1]
    stock = tmp_path / "stock"
    first = pretrain(1, *still, "--load", folder, "--save", stock, data=data_prefix, script=STOCK)
    assert "number of parameters" in first
    assert not logged(first, "pool_size")
    assert _different(_model(folder / "iter_0000002"), _model(stock / "iter_0000001")) == []
    # the paper's annealing: a standard model goes on with pools
    back = tmp_path / "back"
    second = pretrain(1, *still, *POOLS, "--load", stock, "--save", back, data=data_prefix)
    assert logged(second, "pool_size")
    assert _different(_model(stock / "iter_0000001"), _model(back / "iter_0000001")) == []


def test_with_pools_off_losses_are_those_of_the_stock_router(data_prefix, tmp_path):
    # one sample a micro-batch: stock layers put the tokens of several in another order
    flags = ["--micro-batch-size", 1, "--moe-aux-loss-coeff", 0, "--moe-router-load-balancing-type"]
    flags += ["none", "--moe-z-loss-coeff", 0, "--train-iters", 4]
    output = pretrain(1, *flags, "--tensorboard-dir", tmp_path / "ours", data=data_prefix)
    assert not logged(output, "pool_size")
    pretrain(1, *flags, "--tensorboard-dir", tmp_path / "stock", data=data_prefix, script=STOCK)
    ours, stock = scalars(tmp_path / "ours"), scalars(tmp_path / "stock")
    assert len(ours) == 4
    assert ours == stock
    assert scalars(tmp_path / "ours", "grad-norm") == scalars(tmp_path / "stock", "grad-norm")
