"""Run a step of this package in processes of its own: one command for the user, one process for every GPU."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from emo_megatron.mcore.flags import flags_of, prefixed
from emo_megatron.modules.options import SelectOptions, StatsOptions

ROOT = Path(__file__).resolve().parents[2]
FAILED = "{} failed with exit code {}; what it said is above"


def torchrun(*arguments: str, processes: int = 1) -> list[str]:
    """A torchrun command of this interpreter, on a free port."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return [*launcher, "--nproc-per-node", str(processes), *arguments]


def run_stats(options: StatsOptions) -> Path:
    """Measure a checkpoint's experts; returns the statistics file.

    Raises:
        RuntimeError: the processes failed, and said why.
    """
    _run("stats", options, checkpoint=options.checkpoint)
    return options.output


def run_select(options: SelectOptions) -> Path:
    """Choose experts; returns the Selection file.

    Raises:
        ValueError: what was asked for cannot be.
        RuntimeError: the processes that ran the model failed, and said why.
    """
    from emo_megatron.modules.choosing import select

    if options.needs_model or not options.stats:
        assert options.checkpoint is not None, "checked with the options"
        _run("select", options, checkpoint=options.checkpoint)
    else:
        select(options)
    return options.output


def _run(step: str, options: StatsOptions | SelectOptions, *, checkpoint: Path) -> None:
    command = torchrun(
        *("-m", f"emo_megatron.mcore.{step}", "--load", str(checkpoint.absolute())),
        *flags_of(options, flag=prefixed(step)),
        *shlex.split(options.megatron),
        processes=options.processes,
    )
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise RuntimeError(FAILED.format(step, code))
