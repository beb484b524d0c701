"""Which checkpoint a command and a training run load, and layouts that a model cannot be cut into."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import checkpoints

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.source import check_router, loaded_by_megatron, run_with
from emo_megatron.finite import NotFiniteError
from emo_megatron.mcore import cpu
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners.loading import (
    OTHER_SOURCES,
    _balance_nothing,
    check_layout,
    check_rows,
    checkpoint_in,
    megatron_errors,
)

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(autouse=True)
def _no_cpu_backend(monkeypatch):
    """What is looked at here runs no Megatron, and in this process other tests follow."""
    monkeypatch.setattr(cpu, "activate", lambda: False)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A run's folder with iteration 7 of a model with a dense layer."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ranks(1).run(checkpoints.save, folder=str(folder), layout={}, config=checkpoints.UNEQUAL)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "run")


def test_the_path_that_is_named_is_opened(run, tmp_path, monkeypatch):
    iteration = run / "iter_0000007"
    (run / TRACKER).write_text("800")
    (tmp_path / "link").symlink_to(iteration)
    monkeypatch.chdir(tmp_path)
    for path in (iteration, f"{iteration}/", "run/iter_0000007", "link"):
        opened = checkpoint_in(["--load", str(path), "--seed", "1"])
        # Megatron finds it under a name of its own
        with run_with(opened.path) as given:
            found = MegatronCheckpoint(given).path
            assert found.resolve() == iteration
            assert found.parent.resolve() != run
        assert not given.exists()


@pytest.mark.parametrize("said", ["", "latest", "-1", "7 8", "\\x00"])
def test_a_tracker_that_names_no_iteration_is_an_error(run, said):
    (run / TRACKER).write_text(said)
    with pytest.raises(ValueError, match=TRACKER):
        checkpoint_in([f"--load={run}"])
    with pytest.raises(ValueError, match=TRACKER):
        loaded_by_megatron(_flags(load=run))


def test_a_folder_without_a_tracker_or_a_checkpoint_is_an_error(run):
    (run / TRACKER).unlink()
    with pytest.raises(ValueError, match=TRACKER):
        checkpoint_in(["--load", str(run)])
    with pytest.raises(ValueError, match="--load must name"):
        checkpoint_in(["--seed", "1"])


@pytest.mark.parametrize("flag", OTHER_SOURCES)
def test_no_other_checkpoint_can_be_slipped_in(saved, flag):
    for given in ([flag, "x"], [f"{flag}=x"]):
        with pytest.raises(ValueError, match=f"{flag} cannot be given"):
            checkpoint_in(["--load", str(saved), *given])


def _flags(**flags):
    plain = {"load": None, "pretrained_checkpoint": None, "ckpt_step": None}
    return argparse.Namespace(**plain | {n: v if n == "ckpt_step" else str(v) for n, v in flags.items()})


def test_what_a_training_run_loads_is_what_megatron_finds(run, tmp_path):
    seven, fresh = run / "iter_0000007", tmp_path / "fresh"
    eight = shutil.copytree(seven, run / "iter_0000008")
    released = tmp_path / "released"
    for name in ("release", "iter_0000008"):
        shutil.copytree(seven, released / name)
    (released / TRACKER).write_text("release")

    def found(**flags):
        return loaded_by_megatron(_flags(**flags)).path

    assert found(load=run) == seven
    assert found(load=run, ckpt_step=8) == eight
    assert found(load=run, ckpt_step=0) == seven
    assert found(load=run, pretrained_checkpoint=released) == seven
    assert found(load=fresh, pretrained_checkpoint=run) == seven
    assert found(load=fresh, pretrained_checkpoint=run, ckpt_step=8) == eight
    assert found(pretrained_checkpoint=released) == released / "release"
    # Megatron takes the release whatever the step
    assert found(load=released, ckpt_step=8) == released / "release"
    (run / TRACKER).unlink()
    assert found(load=run, ckpt_step=8) == eight
    for flag, flags in {
        "--load": {"load": run},
        "--load .*iter_0000007": {"load": seven},
        "--pretrained-checkpoint": {"load": fresh, "pretrained_checkpoint": run, "ckpt_step": 8},
    }.items():
        with pytest.raises(ValueError, match=f"{flag}.* random weights"):
            found(**flags)
    with pytest.raises(ValueError, match="name it with --load"):
        found()


@pytest.mark.parametrize(
    ("flags", "processes", "what"),
    [
        ("--tensor-model-parallel-size 3", 3, "64 rows of the vocabulary.*--tensor-parallel 3"),
        ("--tensor-model-parallel-size 8", 8, "4 attention heads.*--tensor-parallel 8"),
        ("--tensor-model-parallel-size 4", 4, "6 query groups.*--tensor-parallel 4"),
        ("--expert-model-parallel-size 3", 3, "8 experts.*--expert-parallel 3"),
        ("--pipeline-model-parallel-size=3", 3, "4 layers.*--pipeline-parallel 3"),
        ("--pipeline-model-parallel-size 2", 3, "3 processes.*--pipeline-parallel, 2"),
        ("--expert-model-parallel-size 4", 2, "2 processes of a pipeline stage.*--expert-parallel 4"),
        ("--expert-tensor-parallel-size 32", 32, "16 .*--expert-tensor-parallel-size 32"),
    ],
)
def test_a_layout_that_cannot_be_is_told_with_its_number(saved, monkeypatch, flags, processes, what):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    checkpoint = MegatronCheckpoint(saved)
    for name, value in {
        "num_attention_heads": 4,
        "group_query_attention": "query" in what,
        "num_query_groups": 6,
    }.items():
        setattr(checkpoint.args, name, value)
    with pytest.raises(ValueError, match=what):
        check_layout(checkpoint, flags.split())


def test_layouts_that_can_be_are_left_alone(saved, monkeypatch):
    checkpoint = MegatronCheckpoint(saved)
    for processes, flags in {
        1: "",
        8: "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1",
        3: "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 2",
    }.items():
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        check_layout(checkpoint, flags.split())
    args = argparse.Namespace(tensor_model_parallel_size=2)
    check_rows(33, rows=2, args=args)
    with pytest.raises(ValueError, match=r"--seq-length 33 .*--tensor-parallel 2"):
        check_rows(33, rows=1, args=args)


class _Routers:
    """A checkpoint of one layer with this router."""

    path = Path("checkpoint")

    def __init__(self, **tensors):
        self.routers = {3: "decoder.layers.2.mlp.router."}
        self._tensors = {f"decoder.layers.2.mlp.router.{name}": tensor for name, tensor in tensors.items()}
        self.names = self._tensors

    def read(self, name):
        return self._tensors[name]


def _layer(**tensors):
    return SimpleNamespace(layer_number=3, router=SimpleNamespace(state_dict=lambda: tensors))


def test_all_that_routes_must_be_what_is_stored():
    weight_EH, bias_E = torch.arange(12.0).view(4, 3) + 0.1, torch.arange(4.0)
    check_router(_layer(weight=weight_EH), _Routers(weight=weight_EH))
    check_router(_layer(weight=weight_EH.bfloat16()), _Routers(weight=weight_EH))
    both = _Routers(weight=weight_EH, expert_bias=bias_E)
    check_router(_layer(weight=weight_EH, expert_bias=bias_E), both)
    for other in (
        _layer(weight=weight_EH + 1, expert_bias=bias_E),
        _layer(weight=weight_EH, expert_bias=bias_E + 1),
        # a model that was built without what the run had
        _layer(weight=weight_EH),
    ):
        with pytest.raises(ValueError, match=r"did not load checkpoint.*layer 3"):
            check_router(other, both)
    with pytest.raises(ValueError, match=r"did not load checkpoint.*layer 3"):
        check_router(_layer(weight=weight_EH), _Routers())
    weight_EH[2, 1] = torch.nan
    with pytest.raises(NotFiniteError, match="layer 3, expert 2"):
        check_router(_layer(weight=weight_EH), _Routers(weight=weight_EH))


@pytest.mark.parametrize(
    ("kinds", "is_forgotten"),
    [
        ("aux_loss", True),
        (["seq_aux_loss", "global_aux_loss"], True),
        ("none", True),
        # they choose other experts, also where nothing is trained
        ("sinkhorn", False),
        ("quantile_balancing", False),
        (["aux_loss", "quantile_balancing"], False),
    ],
)
def test_only_losses_of_the_balance_are_forgotten(kinds, is_forgotten):
    args = argparse.Namespace(moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=0.1)
    _balance_nothing(args)
    assert args.moe_router_load_balancing_type == ("none" if is_forgotten else kinds)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_megatron_builds_is_no_refusal(number, error):
    # tests in the background ignore Ctrl-C
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(error) as stopped, stops_on_signals(), megatron_errors():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
    assert error is KeyboardInterrupt or stopped.value.code == 128 + number


def test_flags_of_no_size_are_one_line(saved):
    with pytest.raises(ValueError, match="--context-parallel-size"):
        check_layout(MegatronCheckpoint(saved), ["--context-parallel-size", "x"])
