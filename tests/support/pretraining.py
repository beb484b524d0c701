"""Real pretraining runs of a small model, and what they wrote."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch

from emo_megatron.runners.launch import python
from emo_megatron.variables import process_environment
from support.forks import run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_emo.py"
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
--log-interval 1
""")
MASKING = "--dataloader-inter-document-masking"
FLAGS.append(MASKING)


def write_data(folder: Path) -> Path:
    """Documents of 1 to 90 tokens in Megatron's indexed format, NullTokenizer's end-of-document included."""
    from emo_megatron.mcore.dataset import write_indexed_dataset

    lengths = [1 + (37 * i) % 90 for i in range(200)]
    documents = [[(n * 7 + i) % (VOCAB - 1) for i in range(n)] + [VOCAB - 1] for n in lengths]
    write_indexed_dataset(folder / "text", documents, vocab_size=VOCAB)
    return folder / "text"


def _arguments(flags: tuple[object, ...], *, data: Path | None, is_tied: bool) -> list[str]:
    """FLAGS and `flags`, the later of which win; without data Megatron's mock data."""
    source = ["--data-path", data, "--data-cache-path", data.parent] if data else ["--mock-data"]
    # a switch cannot be taken back
    left_out = {MASKING} if {"routers", "--sft"} & {*flags} else set()
    left_out |= {"--untie-embeddings-and-output-weights"} if is_tied else set()
    own = [flag for flag in FLAGS if flag not in left_out]
    return [str(argument) for argument in (*own, *source, "--vocab-size", VOCAB, *flags)]


def _environment(flags: tuple[object, ...]) -> dict[str, str]:
    return process_environment() | {
        "EMO_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        # Megatron-FSDP refuses 1, which tensor parallelism needs
        "CUDA_DEVICE_MAX_CONNECTIONS": "8" if "--use-megatron-fsdp" in flags else "1",
    }


def start(
    processes: int, *flags: object, data: Path | None, script: Path = SCRIPT, is_tied: bool = False
) -> subprocess.Popen[str]:
    """A run as a user starts it, under torchrun where it has several processes."""
    return subprocess.Popen(
        python(script, *_arguments(flags, data=data, is_tied=is_tied), processes=processes),
        env=_environment(flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(run: subprocess.Popen[str]) -> None:
    """Kill the launcher, the ranks, and what they started: checkpoint writers outlive a killed rank."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def pretrain(
    processes: int,
    *flags: object,
    data: Path | None,
    script: Path = SCRIPT,
    expect_failure: bool = False,
    is_tied: bool = False,
    in_forks: bool = True,
) -> str:
    """Such a run to its end, in forks, which take a fourth of the time, or as a user starts it; what it printed."""
    if in_forks:
        arguments, environment = _arguments(flags, data=data, is_tied=is_tied), _environment(flags)
        code, output = run_script(script, arguments, processes=processes, environment=environment)
    else:
        run = start(processes, *flags, data=data, script=script, is_tied=is_tied)
        try:
            output, _ = run.communicate(timeout=300)
        finally:
            stop(run)
        code = run.returncode
    assert (code != 0) == expect_failure, output[-4000:]
    return output


def logged(output: str, name: str = "lm loss") -> list[float]:
    """A value of every logged step. After a resume the second is the mean of the first two: Megatron's log does so."""
    return [float(v) for v in re.findall(rf"\| {name}: ([\d.E+-]+)", output)]


def scalars(folder: Path, name: str = "lm loss") -> dict[int, float]:
    """Step -> value in TensorBoard's files, float32 as they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {scalar.step: scalar.value for scalar in events.Scalars(name)}


def stored_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint, optimizer included, through torch's own reader."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(checkpoint))
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
