"""Convert the weights of a Megatron-FSDP checkpoint (--ckpt-format fsdp_dtensor) to torch_dist, for all commands.

    python -m emo_megatron.checkpoint.fsdp --checkpoint RUN --output NEW_FOLDER

Megatron itself converts in the other direction only. A Megatron-FSDP checkpoint has the names of the PyTorch modules,
and stores every expert and each half of a gated projection separately. The conversion needs no GPU and no process
group.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load

from emo_megatron.checkpoint.folders import reading, tracked_folder
from emo_megatron.checkpoint.names import EXPERTS, Piece, pieces_of
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import LazyWeight, write_checkpoint
from emo_megatron.files import must_not_exist

_MODEL = re.compile(r"model\.(?:module\.)*")
_ALONE = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))(\d+)(_[wv])?$")


class FsdpCheckpoint(MegatronCheckpoint):
    """An `fsdp_dtensor` checkpoint, with the interface of MegatronCheckpoint."""

    def _folder(self, path: Path) -> Path:
        folder = tracked_folder(path) or path
        if not (folder / ".metadata").is_file() or (folder / "metadata.json").exists():
            raise ValueError(
                f"{folder} is not a checkpoint of Megatron-FSDP: name the folder that --save wrote with --ckpt-format "
                "fsdp_dtensor, or the folder of one iteration in it"
            )
        return folder

    def _found(self, sizes: dict[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        is_latent = getattr(self.args, "multi_latent_attention", False)
        if is_latent and getattr(self.args, "mla_down_proj_fusion", False):
            raise ValueError(
                f"{self.path} must be of a run without --mla-down-proj-fusion, whose names of norms are not supported"
            )
        # Megatron's layers of multi-latent attention keep the names of their norms
        is_local = self.args.transformer_impl == "local" and not is_latent
        stored = {
            _name(name, is_local=is_local): name for name in sizes if _MODEL.match(name) and "_extra_state" not in name
        }
        if not stored:
            raise ValueError(f"{self.path} must hold a model of Megatron-FSDP; no weight was found")
        found = pieces_of({name: sizes[at] for name, at in stored.items()})
        experts = set(range(self.args.num_experts or 0))
        for name, pieces in found.items():
            # expert-parallel ranks of Megatron-FSDP may store biases of different experts under the same name
            if EXPERTS in name and {piece.offset[0] for piece in pieces} != experts:
                raise ValueError(f"{self.path} must hold {name} of all {len(experts)} experts; some are missing")
        return {
            name: [dataclasses.replace(piece, stored=stored[piece.stored]) for piece in pieces]
            for name, pieces in found.items()
        }

    @cached_property
    def common(self) -> dict[str, Any]:
        """The flags of the training run, under the key `args`."""
        held: dict[str, Any] = {"args": None}
        if "args" not in self._metadata.state_dict_metadata:
            # a checkpoint of Megatron-Bridge
            return held
        with reading(self.path / ".metadata"):
            load(held, storage_reader=self._reader, no_dist=True)
        return held


def _name(stored: str, *, is_local: bool) -> str:
    """The torch_dist name of a tensor in a Megatron-FSDP checkpoint; every expert has its own name."""
    name = _MODEL.sub("", stored, count=1)
    name = _ALONE.sub(rf"{EXPERTS}\1.", name)
    name = _GROUPED.sub(rf"{EXPERTS}\2.\1\3", name)
    if is_local:
        # torch_dist names a norm after the next projection, because Transformer Engine fuses the two
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return name


def convert(checkpoint: Path, output: Path) -> Path:
    """Write the weights as a torch_dist checkpoint, without optimizer state, at iteration 0."""
    must_not_exist(output)
    source = FsdpCheckpoint(checkpoint)
    args = copy.copy(source.args)
    args.use_megatron_fsdp, args.ckpt_format = False, "torch_dist"
    weights = {
        name: LazyWeight(shape=info.shape, dtype=info.dtype, rows=functools.partial(_rows, source, name))
        for name, info in source.names.items()
    }
    return write_checkpoint(output, weights, args=args)


def _rows(source: FsdpCheckpoint, name: str, start: int, stop: int) -> torch.Tensor:
    return source.read(name, slice(start, stop))


def main() -> None:
    """Run the conversion from the command line."""
    parser = argparse.ArgumentParser(description="Convert a Megatron-FSDP checkpoint to torch_dist.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="The folder that --save named.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write; must not exist.")
    options = parser.parse_args()
    try:
        print(convert(options.checkpoint, options.output))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
