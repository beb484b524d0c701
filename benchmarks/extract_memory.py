"""How much memory does `extract` need? A quarter of the experts is extracted from a synthetic checkpoint.

    .venv/bin/python benchmarks/extract_memory.py

Writes a checkpoint with stacked layers as Megatron does (bfloat16, one chunk per expert), runs `extract` in a separate
process, and prints how far that process's largest resident size is above its resident size after its imports.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure extract."""

    layers: int = 8
    experts: int = 64
    hidden: int = 1024
    expert_hidden: int = 768
    keep: int = 16
    folder: Path | None = None
    """Where the checkpoint goes; a temporary folder by default."""
    extract: bool = False
    """Used by itself: extract from the folder and print peaks."""


def write(options: Options, folder: Path) -> None:
    """The checkpoint of a model of equal layers."""
    from emo_megatron.mcore import cpu

    cpu.activate()
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    layers, experts, hidden = options.layers, options.experts, options.hidden
    shapes = {
        "mlp.experts.experts.linear_fc1.weight": (2 * options.expert_hidden, hidden),
        "mlp.experts.experts.linear_fc2.weight": (hidden, options.expert_hidden),
    }
    state = {}
    for name, shape in shapes.items():
        for layer in range(layers):
            for expert in range(experts):
                weight = torch.empty(shape, dtype=torch.bfloat16).normal_()
                state[f"{name}.{layer}.{expert}"] = ShardedTensor.from_rank_offsets(
                    f"decoder.layers.{name}", weight, (0, layer, layers), (1, expert, experts), prepend_axis_num=2
                )
    for layer in range(layers):
        state[f"router.{layer}"] = ShardedTensor.from_rank_offsets(
            "decoder.layers.mlp.router.weight", torch.randn(experts, hidden), (0, layer, layers), prepend_axis_num=1
        )
    args = argparse.Namespace(num_experts=experts, moe_router_topk=2)
    folder.mkdir(parents=True)
    dist_checkpointing.save({"model": state, "args": args, "iteration": 1}, str(folder))


def extract_here(options: Options, folder: Path) -> None:
    """Extract, and print megabytes and seconds."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import extract
    from emo_megatron.experts.selection import Selection

    parent = MegatronCheckpoint(folder / "parent")
    generator = torch.Generator().manual_seed(0)
    mask_LE = torch.zeros(options.layers, options.experts, dtype=torch.bool)
    for row in mask_LE:
        row[torch.randperm(options.experts, generator=generator)[: options.keep]] = True
    selection = Selection.from_mask(
        mask_LE, layers=parent.moe_layers, method="random", seed=0, model=parent.fingerprint
    ).save(folder / "selection.json")
    # a new count of the largest size: a process inherits its parent's
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.perf_counter()
    extract.run(extract.Options(checkpoint=folder / "parent", selection=selection, output=folder / "module"))
    seconds = time.perf_counter() - start
    experts = 6 * options.hidden * options.expert_hidden * options.experts / 1e6
    print(f"checkpoint      {_size(folder / 'parent'):8.0f} MB")
    print(f"module          {_size(folder / 'module'):8.0f} MB")
    print(f"a layer's experts {experts:6.0f} MB")
    print(f"after imports   {before:8.0f} MB resident")
    print(f"extract adds    {_peak() - before:8.0f} MB at its peak, in {seconds:.1f} s")


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*")) / 1e6


def main(options: Options) -> None:
    """Write, then extract in another process."""
    if options.extract:
        assert options.folder is not None
        extract_here(options, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write(options, folder / "parent")
        sizes = [
            f"--{name.replace('_', '-')}={getattr(options, name)}"
            for name in ("layers", "experts", "hidden", "expert_hidden", "keep")
        ]
        command = [sys.executable, __file__, "--extract", "--folder", str(folder), *sizes]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,)))
