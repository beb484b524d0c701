"""Megatron's distributed checkpoints by tensor name and slice: the model's weights, whatever layout wrote them.

One set of names for every checkpoint: layers apart (`decoder.layers.3.mlp.router.weight`), experts on the first axis
(`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`, [E, 2f, h]). Megatron also stacks equal layers in one tensor
and can store every expert alone, the halves of a gated projection apart; none of it shows here. Nothing is read but
what is asked for, chunk by chunk (Megatron stores each expert in a chunk of its own). No process group is needed.
"""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.dist_checkpointing.core import maybe_load_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from emo_megatron.checkpoint.damage import damage_of
from emo_megatron.checkpoint.names import Piece, in_order, pieces_of

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint of weights without a run: no optimizer, iteration 0."""

_OLD_COMMON_FILE = "common.pt"
"""Where earlier versions of Megatron keep what a checkpoint holds besides tensors."""
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronCheckpoint:
    """A `torch_dist` checkpoint, read in this process.

    Args:
        path: the folder that `--save` named (its latest checkpoint is taken) or one iteration's folder in it.

    Attributes:
        path: the iteration's folder.
        names: every weight of the model, optimizer left out, in the order of layers.

    Raises:
        ValueError: there is no such checkpoint, it has another format, or files of it are missing or cut short.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = self._folder(Path(path))
        self._reader = FileSystemReader(str(self.path))
        with damage_of([".metadata"], folder=self.path, is_unpickled=True):
            self._metadata: Metadata = self._reader.read_metadata()
            _check_parts(self._metadata)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._stored: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _NOT_WEIGHTS.match(name)
        }
        self._check_files()
        self._pieces = self._found({n: tuple(e.size) for n, e in self._stored.items()})
        self.names: dict[str, TensorInfo] = {
            name: TensorInfo(
                tuple(
                    max(piece.offset[axis] + piece.shape[axis] for piece in pieces)
                    for axis in range(len(pieces[0].shape))
                ),
                self._stored[pieces[0].stored].properties.dtype,
            )
            for name, pieces in sorted(self._pieces.items(), key=lambda item: in_order(item[0]))
        }
        for name, info in self.names.items():
            if sum(math.prod(piece.shape) for piece in self._pieces[name]) != math.prod(info.shape):
                raise ValueError(f"{self.path} is not whole: it has a part of {name} only")

    def _folder(self, path: Path) -> Path:
        return _iteration_folder(path)

    def _found(self, sizes: dict[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        return pieces_of(sizes)

    @cached_property
    def common(self) -> dict[str, Any]:
        """What the checkpoint holds besides tensors, through Megatron's own reader: args, iteration, ...

        Raises:
            ValueError: its file is damaged, or holds what this Megatron does not have.
        """
        with damage_of([self._common_file], folder=self.path, is_unpickled=True), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            return dict(load_common_state_dict(str(self.path)))

    @property
    def args(self) -> argparse.Namespace:
        """The flags of the run that wrote it.

        Raises:
            ValueError: it holds none, or lacks some that every run has.
        """
        args = self.common.get("args")
        if not isinstance(args, argparse.Namespace):
            raise ValueError(f"{self.path} does not hold the flags of its run: save it again")
        lacking = [name for name in ("num_experts", "moe_router_topk") if not hasattr(args, name)]
        if lacking:
            raise ValueError(
                f"the flags in {self.path} lack {', '.join(lacking)}: it was written by a version of Megatron that is "
                "not supported; load it in a supported one and save it again"
            )
        return args

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a router, from 1."""
        found = (re.fullmatch(r"decoder\.layers\.(\d+)\.mlp\.router\.weight", n) for n in self.names)
        return tuple(sorted(int(match[1]) + 1 for match in found if match))

    def layer_view(self, number: int) -> LayerView:
        """The weights of one layer, counted from 1, by the rest of their names."""
        prefix = f"decoder.layers.{number - 1}."
        names = {n.removeprefix(prefix): i for n, i in self.names.items() if n.startswith(prefix)}
        if not names:
            raise ValueError(f"{self.path} has no layer {number}")
        return LayerView(checkpoint=self, number=number, names=names)

    def read(self, name: str, index: int | slice | Sequence[int] | None = None) -> Tensor:
        """A weight, or a part of it along its first axis, as indexing with `index` gives it.

        Args:
            name: one of `names`.
            index: a place (the axis is dropped), a slice, or places in the order wanted; None: all of it.

        Raises:
            KeyError: no weight has this name.
            IndexError: a place outside the tensor.
        """
        shape = self.names[name].shape
        if index is None:
            return self.read_box(name, (0,) * len(shape), shape)
        rows = range(shape[0])
        chosen = (
            [rows[index]]
            if isinstance(index, int)
            else list(rows[index])
            if isinstance(index, slice)
            else [rows[i] for i in index]
        )
        result = torch.empty((len(chosen), *shape[1:]), dtype=self.names[name].dtype)
        plan = _Plan()
        for place, row in enumerate(chosen):
            offset = (row, *(0 for _ in shape[1:]))
            self._plan(plan, name, offset, result[place : place + 1])
        self._run(plan)
        return result[0] if isinstance(index, int) else result

    def read_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a weight that begins at `offset` and has this shape."""
        result = torch.empty(tuple(shape), dtype=self.names[name].dtype)
        plan = _Plan()
        self._plan(plan, name, tuple(offset), result)
        self._run(plan)
        return result

    def _plan(self, plan: _Plan, name: str, offset: Sequence[int], result: Tensor) -> None:
        """Add the reads that fill `result`, the box of a weight at `offset`."""
        for piece in self._pieces[name]:
            low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            high = [
                min(a + n, b + m) for a, n, b, m in zip(offset, result.shape, piece.offset, piece.shape, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            box = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            within = [a - o for a, o in zip(low, piece.offset, strict=True)][piece.extra :]
            target = result[box]
            target = target.view(*(1 for _ in piece.lead), *target.shape[piece.extra :])
            plan.add(piece.stored, (*piece.lead, *within), target)

    def _run(self, plan: _Plan) -> None:
        items = plan.items(self._stored)
        stored = self._metadata.storage_data
        files = {stored[item.storage_index].relative_path for item in items}
        with damage_of(files, folder=self.path):
            self._reader.read_data(LoadPlan(items), plan).wait()

    @property
    def _common_file(self) -> str:
        if (self.path / _OLD_COMMON_FILE).exists():
            return _OLD_COMMON_FILE
        for index, place in self._metadata.storage_data.items():
            if index.fqn.startswith("common_state/"):
                return str(place.relative_path)
        return ".metadata"

    def _check_files(self) -> None:
        """Every chunk of a weight lies whole in its file; said before anything is written elsewhere."""
        sizes: dict[str, int] = {}
        for index, place in self._metadata.storage_data.items():
            if index.fqn not in self._stored:
                continue
            file = place.relative_path
            if file not in sizes:
                path = self.path / file
                sizes[file] = path.stat().st_size if path.exists() else -1
            if sizes[file] < 0:
                raise ValueError(f"{self.path} is not whole: its file {file} is missing")
            if sizes[file] < place.offset + place.length:
                raise ValueError(f"{self.path} is not whole: its file {file} was cut short")


def _check_parts(metadata: Metadata) -> None:
    """Look at every part that is used later: from a damaged file come objects that lack some.

    Raises:
        AttributeError, TypeError: one is not there, or is something else.
    """
    if not isinstance(metadata.storage_data, dict):
        raise TypeError("it holds something else")
    for place in metadata.storage_data.values():
        _ = Path(place.relative_path), place.offset + place.length
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            _ = tuple(entry.size), entry.properties.dtype.itemsize
            _ = [(*chunk.offsets, *chunk.sizes) for chunk in entry.chunks]


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One layer of a checkpoint.

    Attributes:
        number: from 1.
        names: its weights without `decoder.layers.N.`; of experts [E, ...].
    """

    checkpoint: MegatronCheckpoint
    number: int
    names: dict[str, TensorInfo]

    def read(self, name: str, index: int | slice | Sequence[int] | None = None) -> Tensor:
        """As `MegatronCheckpoint.read`."""
        return self.checkpoint.read(f"decoder.layers.{self.number - 1}.{name}", index)


class _Plan(DefaultLoadPlanner):
    """Reads into tensors that are at hand."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes: dict[str, list[ChunkStorageMetadata]] = {}
        self._targets: dict[str, list[Tensor]] = {}

    def add(self, stored: str, offset: Sequence[int], target: Tensor) -> None:
        """Fill `target` with the box of the stored tensor that begins at `offset`."""
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=target.shape)
        self._boxes.setdefault(stored, []).append(chunk)
        self._targets.setdefault(stored, []).append(target)

    def items(self, stored: dict[str, TensorStorageMetadata]) -> list[ReadItem]:
        """The reads, all boxes of a tensor matched with its chunks at once."""
        return [
            item
            for name, boxes in self._boxes.items()
            for item in create_read_items_for_chunk_list(name, stored[name], boxes)
        ]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.index is not None
        target = self._targets[index.fqn][index.index]
        for axis, start in enumerate(read_item.dest_offsets):
            target = target.narrow(axis, start, read_item.lengths[axis])
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the target is the caller's tensor."""


def tracked_folder(run: Path) -> Path | None:
    """The iteration's folder that the tracker in a run's folder names, as Megatron takes it; None without a tracker.

    Raises:
        ValueError: the tracker names none.
    """
    tracker = run / TRACKER
    if not tracker.is_file():
        return None
    said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if said == RELEASE:
        return run / RELEASE
    # int() refuses thousands of digits
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise ValueError(
            f"{tracker} must hold the number of an iteration or {RELEASE!r}; got {said[:80]!r}: name the folder of an "
            "iteration, or write its number there"
        )
    return run / f"iter_{int(said):07d}"


def _iteration_folder(path: Path) -> Path:
    """The folder with the checkpoint's metadata.

    Raises:
        ValueError: there is none, or it is not a `torch_dist` checkpoint.
    """
    folder = tracked_folder(path) or path
    if not folder.is_dir():
        raise ValueError(f"no checkpoint in {path}: {folder} does not exist")
    with damage_of(["metadata.json"], folder=folder, is_unpickled=True):
        config = maybe_load_config(str(folder))
    if config is None and (folder / ".metadata").exists():
        raise ValueError(
            f"{folder} is not a torch_dist checkpoint: one of Megatron-FSDP (--ckpt-format fsdp_dtensor) becomes one "
            f"with python -m emo_megatron.checkpoint.fsdp --checkpoint {path} --output NEW_FOLDER"
        )
    if config is None or config.sharded_backend != "torch_dist":
        raise ValueError(
            f"{folder} is not a torch_dist checkpoint: name the folder that --save wrote, with its {TRACKER}, or one "
            "iteration's in it, and convert other formats with Megatron's --ckpt-convert-format torch_dist"
        )
    if not (folder / ".metadata").exists():
        raise ValueError(f"{folder} is not whole: its .metadata is missing")
    return folder
