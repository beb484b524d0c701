"""examples/pretrain_emo.py: real .bin/.idx data, layouts, metrics, checkpoints, resume."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from support.pretraining import SCRIPT, logged, pretrain, scalars, stored_tensors

from emo_megatron.config import PoolConfig
from emo_megatron.variables import process_environment


@pytest.fixture(scope="session")
def single(data_prefix):
    """What one process logs."""
    return pretrain(1, "--pool-min", 3, data=data_prefix)


SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        # test_resume.py trains these two too, and compares their losses
        pytest.param(2, ["--expert-model-parallel-size", 2], marks=pytest.mark.slow),
        pytest.param(2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"], marks=pytest.mark.slow),
        pytest.param(2, ["--pipeline-model-parallel-size", 2, *SELECTIVE], marks=pytest.mark.slow),
        pytest.param(
            2,
            ["--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            ["--expert-model-parallel-size", 2, "--bf16", "--overlap-moe-expert-parallel-comm"],
            marks=pytest.mark.slow,
        ),
        pytest.param(4, ["--pipeline-model-parallel-size", 4], marks=pytest.mark.slow),
    ],
    ids=["EP2", "TP2+SP", "PP2+recompute", "PP2xVPP2", "EP2+overlap", "PP4"],
)
def test_layouts_train_and_draw_the_same_pool_sizes(processes, flags, data_prefix, single):
    output = pretrain(processes, "--pool-min", 3, *flags, data=data_prefix, in_forks=False)
    losses = logged(output)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    # initial weights differ between layouts, pool sizes come from the data alone
    assert logged(output, "pool_size") == pytest.approx(logged(single, "pool_size"), abs=0.011)
    assert output.count("Megatron runs on the CPU over gloo") == 1


def test_boundaries_for_the_routers_only_give_the_same_pool_sizes(data_prefix, single):
    flags = ["--pool-min", 3, "--pool-documents", "routers"]
    # Megatron's rotary embedding under context parallelism pins memory, which a CPU has not
    flags += ["--position-embedding-type", "learned_absolute", "--context-parallel-size", 2]
    output = pretrain(2, *flags, "--calculate-per-token-loss", data=data_prefix)
    losses = logged(output)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert logged(output, "pool_size") == pytest.approx(logged(single, "pool_size"), abs=0.011)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, ["--pool-documents", "routers", "--pool-eos-starts-document"]),
        (2, ["--pipeline-model-parallel-size", 2, "--eval-micro-batch-size", 1]),
    ],
    ids=["routers", "PP2"],
)
def test_evaluation_on_mock_data(processes, flags):
    evaluation = ["--pool-eval", 4, "--eval-iters", 1, "--eval-interval", 2]
    output = pretrain(processes, "--pool-min", 3, *evaluation, *flags, data=None)
    assert all(2 < size < 8 for size in logged(output, "pool_size"))
    validated = re.findall(r"validation loss at iteration \d+ .*?lm loss value: ([\d.E+-]+)", output)
    assert len(validated) >= 2
    assert all(float(loss) < 7 for loss in validated)


def test_metrics_checkpoint_and_resume(data_prefix, tmp_path):
    from megatron.core.dist_checkpointing import load_common_state_dict

    flags = ["--pool-min", 3, "--use-distributed-optimizer", "--ckpt-format", "torch_dist"]
    # the other format stores what lies between the tensors too, which nobody initialised
    flags += ["--dist-ckpt-optim-fully-reshardable"]
    flags += ["--pool-min-decay-samples", 24, "--pool-delay-samples", 16, "--pool-skew", 1.5]
    flags += ["--expert-model-parallel-size", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def save(folder):
        return ["--save", folder, "--save-interval", 2, "--tensorboard-dir", folder / "tb"]

    # ranks of torchrun have hashes of their own, by which none may decide what all do together
    pretrain(2, *flags, *save(whole), data=data_prefix, in_forks=False)
    (whole / "latest_checkpointed_iteration.txt").write_text("2")
    pretrain(2, *flags, *save(parts), "--load", whole, data=data_prefix)
    for name in ("lm loss", "grad-norm", "learning-rate", "global_load_balancing_loss"):
        resumed = scalars(parts / "tb", name)
        assert resumed == {step: value for step, value in scalars(whole / "tb", name).items() if step > 2}, name
        assert len(resumed) == 2
    wanted = stored_tensors(whole / "iter_0000004")
    found = stored_tensors(parts / "iter_0000004")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []

    for name in (
        "pool_size",
        "experts_per_document",
        "token_entropy",
        "document_entropy",
        "load_imbalance",
        "global_load_balancing_loss",
        "z_loss",
    ):
        assert len(scalars(whole / "tb", name)) == 4, name
    sizes = scalars(whole / "tb", "pool_size")
    assert sizes[1] == sizes[2] == 0.0, "pools start with the third step"
    assert sizes[3] == 8.0, "the lower bound starts at all experts"
    assert 3.0 < sizes[4] < 8.0
    assert all(value > 1.0 for value in scalars(whole / "tb", "experts_per_document").values())

    args = load_common_state_dict(str(whole / "iter_0000004"))["args"]
    stored = {f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)}
    assert PoolConfig(**stored) == PoolConfig(
        pool_min=3, pool_min_decay_samples=24, pool_delay_samples=16, pool_skew=1.5
    )
    assert all(isinstance(v, int | float | str | None) for v in stored.values())


@pytest.mark.slow
def test_a_checkpoint_written_while_training_goes_on_holds_the_same(data_prefix, tmp_path):
    flags = ["--pool-min", 3, "--ckpt-format", "torch_dist", "--save-interval", 2]
    persistent = ["--async-save", "--async-strategy", "mcore", "--use-persistent-ckpt-worker"]
    pretrain(1, *flags, "--save", tmp_path / "at once", data=data_prefix)
    pretrain(1, *flags, *persistent, "--save", tmp_path / "later", data=data_prefix, in_forks=False)
    for step in ("iter_0000002", "iter_0000004"):
        wanted, found = (stored_tensors(tmp_path / name / step) for name in ("at once", "later"))
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize(("process", "is_needed"), [("SyncManager-1", False), ("MainProcess", True)])
def test_only_the_keeper_of_what_writers_say_imports_nothing(process, is_needed):
    """As multiprocessing does in what it spawns; the one that writes while training goes on needs a device."""
    program = (
        f"import multiprocessing, runpy, sys; multiprocessing.current_process().name = {process!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__mp_main__')\n"
        "print(sorted({'torch', 'megatron', 'emo_megatron'} & sys.modules.keys()))"
    )
    environment = process_environment() | {"EMO_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    imported = ast.literal_eval(done.stdout.splitlines()[-1])
    assert imported == (["emo_megatron", "megatron", "torch"] if is_needed else [])


def test_a_wrong_configuration_is_refused_before_anything_is_built():
    output = pretrain(1, "--pool-min", 1, "--moe-latent-size", 16, data=None, expect_failure=True)
    assert "--pool-min must" in output
    assert "--moe-latent-size" in output
    assert "number of parameters" not in output


def test_help_shows_the_pool_flags():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env={**os.environ, "EMO_DEVICE": "cpu", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "document pools" in done.stdout
