"""AutoBridge exports a model of two ranks: `python -m support.bridge_hf_ranks FOLDER KIND`, which writes ranks.json.

KIND is tensor, expert or pipeline. Both ranks are forks of this process, and load a folder and save another.
"""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support import decoder
from support.bridge_hf import AutoBridge, folder_of, provider, save, unequal
from support.bridge_server import end_of, fork

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_layers": 4, "shared_hidden": 24, "dense_layers": (0, 2), "dense_hidden": 20},
    "qwen2_moe, gated": {"num_layers": 4, "qkv_bias": True, "shared_gate": True, "num_kv_heads": 2},
    "emo": {"num_layers": 4},
}
"""Format and what else -> the model."""


def one_rank(source: Path, output: Path, kind: str) -> None:
    """Load and save; writes how many numbers this rank held."""
    torch.distributed.init_process_group("gloo")
    bridge = AutoBridge.from_hf_pretrained(str(source))
    made = provider(bridge, **{f"{kind}_model_parallel_size": 2})
    made.initialize_model_parallel(seed=0)
    chunks = made.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    held = sum(math.prod(parameter.shape) for chunk in chunks for parameter in chunk.parameters())
    (output.parent / f"{output.name}-{torch.distributed.get_rank()}.txt").write_text(str(held))
    save(bridge, chunks, output)


def export(folder: Path, format: str, kind: str, **model: Any) -> dict[str, Any]:
    """What two ranks make of a folder."""
    source, output = folder_of(folder / "source", format, decoder.architecture(**model)), folder / "again"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        fork(
            lambda: one_rank(source, output, kind),
            out=folder / "out.txt",
            **common,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    codes = [end_of(child) for child in children]
    assert codes == [0, 0], (folder / "out.txt").read_text()[-4000:]
    stored = load_file(source / "model.safetensors")
    whole = sum(math.prod(tensor.shape) for tensor in stored.values())
    return {
        "unequal": unequal(load_file(output / "model.safetensors"), stored),
        "is split": all(int((folder / f"again-{rank}.txt").read_text()) < 0.9 * whole for rank in range(2)),
    }


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    found = {name: export(folder / name, name.partition(",")[0], kind, **model) for name, model in MODELS.items()}
    (folder / "ranks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
