"""examples/pretrain_emo.py under torchrun: real .bin/.idx data, layouts, metrics, checkpoints, resume."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 512

FLAGS = shlex.split("""
--num-layers 4 --hidden-size 32 --ffn-hidden-size 32 --num-attention-heads 4 --swiglu
--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm
--disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 16
--moe-layer-freq [0,1,1,1] --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.02 --moe-z-loss-coeff 0.001
--micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 --min-lr 1e-4 --seed 7
--tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000
--log-interval 1 --dataloader-inter-document-masking
""")


@pytest.fixture(scope="session")
def data_prefix(tmp_path_factory):
    """Documents of 1 to 90 tokens in Megatron's indexed format, NullTokenizer's end-of-document included."""
    from emo_megatron.mcore.dataset import write_indexed_dataset

    prefix = tmp_path_factory.mktemp("data") / "text"
    lengths = [1 + (37 * i) % 90 for i in range(200)]
    documents = [[(n * 7 + i) % (VOCAB - 1) for i in range(n)] + [VOCAB - 1] for n in lengths]
    write_indexed_dataset(prefix, documents, vocab_size=VOCAB)
    return prefix


def _pretrain(
    processes: int, *flags: object, data: Path | None, expect_failure: bool = False
) -> str:
    source = ["--data-path", data, "--data-cache-path", data.parent] if data else ["--mock-data"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, ROOT / "examples" / "pretrain_emo.py", *FLAGS, *source]
    command += ["--vocab-size", VOCAB, *flags]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "EMO_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == expect_failure, output[-4000:]
    return output


def _logged(output: str, name: str = "lm loss") -> list[float]:
    return [float(v) for v in re.findall(rf"\| {name}: ([\d.E+-]+)", output)]


@pytest.fixture(scope="session")
def single(data_prefix):
    """What one process logs."""
    return _pretrain(1, "--pool-min", 3, data=data_prefix)


SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ["--expert-model-parallel-size", 2]),
        (2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
        (
            2,
            ["--pipeline-model-parallel-size", 2, *SELECTIVE],
        ),
        pytest.param(4, ["--pipeline-model-parallel-size", 4], marks=pytest.mark.slow),
    ],
    ids=["EP2", "TP2+SP", "PP2+recompute", "PP4"],
)
def test_layouts_train_and_draw_the_same_pool_sizes(processes, flags, data_prefix, single):
    output = _pretrain(processes, "--pool-min", 3, *flags, data=data_prefix)
    losses = _logged(output)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    # initial weights differ between layouts, pool sizes come from the data alone
    assert _logged(output, "pool_size") == pytest.approx(_logged(single, "pool_size"), abs=0.011)
    assert output.count("Megatron runs on the CPU over gloo") == 1


def test_metrics_checkpoint_and_resume(data_prefix, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--pool-min", 3, "--use-distributed-optimizer", "--ckpt-format", "torch_dist"]
    flags += ["--pool-min-decay-samples", 24, "--expert-model-parallel-size", 2]
    whole = _pretrain(2, *flags, "--tensorboard-dir", tmp_path / "tb", data=data_prefix)
    save = ["--save", tmp_path / "checkpoint", "--save-interval", 2]
    first = _pretrain(2, *flags, *save, "--exit-interval", 2, data=data_prefix)
    second = _pretrain(2, *flags, *save, "--load", tmp_path / "checkpoint", data=data_prefix)
    assert len(_logged(second)) == 2
    assert _logged(first) + _logged(second)[:1] == _logged(whole)[:3]
    assert _logged(second) == pytest.approx(_logged(whole)[2:], rel=1e-3)
    for name in ("grad norm", "learning rate", "pool_size"):
        assert _logged(second, name) == _logged(whole, name)[2:], name

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for name in (
        "pool_size",
        "experts_per_document",
        "token_entropy",
        "document_entropy",
        "load_imbalance",
        "global_load_balancing_loss",
        "z_loss",
    ):
        assert len(events.Scalars(name)) == 4, name
    sizes = [scalar.value for scalar in events.Scalars("pool_size")]
    assert sizes[0] == 8.0, "the lower bound starts at all experts"
    assert sizes[-1] < 8.0

    _check_stored_pool_configuration(tmp_path / "checkpoint" / "iter_0000004")


def _check_stored_pool_configuration(checkpoint: Path) -> None:
    from megatron.core.dist_checkpointing import load_common_state_dict

    from emo_megatron.config import PoolConfig

    common = load_common_state_dict(str(checkpoint))
    stored = {f.name: getattr(common["args"], f.name) for f in dataclasses.fields(PoolConfig)}
    assert stored["pool_min"] == 3
    assert PoolConfig(**stored) == PoolConfig(pool_min=3, pool_min_decay_samples=24)
    assert all(isinstance(v, int | float | str | None) for v in stored.values())


def test_without_pools_it_trains_the_standard_model_on_mock_data():
    output = _pretrain(1, data=None)
    assert len(_logged(output)) == 4
    assert not _logged(output, "pool_size")


def test_a_wrong_configuration_is_refused_before_anything_is_built():
    output = _pretrain(1, "--pool-min", 1, "--moe-router-fusion", data=None, expect_failure=True)
    assert "--pool-min must be at least --moe-router-topk (2)" in output
    assert "--moe-router-fusion must be False" in output
    assert "number of parameters" not in output


def test_help_shows_the_pool_flags():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pretrain_emo.py"), "--help"],
        env={**os.environ, "EMO_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "document pools" in done.stdout
