"""Read weights from Megatron's distributed checkpoints by name and slice, for any parallel layout of the training run.

Weights have the names of names.py (`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`, [E, 2f, h]). Only the
requested parts are read, chunk by chunk (Megatron stores each expert in a separate chunk). No process group is needed.
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

from emo_megatron.checkpoint.bridge_flags import RUN_CONFIG, flags_of_run
from emo_megatron.checkpoint.folders import TRACKER, reading, tracked_folder
from emo_megatron.checkpoint.names import ROUTER, Piece, count_layers, in_order, pieces_of, split_name
from emo_megatron.experts.selection import Selection, router_fingerprint
from emo_megatron.experts.stats import ModelMetadata

MODELOPT_STATE = "modelopt_state"
"""Folder that ModelOpt writes into a checkpoint of a model that ModelOpt has changed."""
_QUANTIZER = re.compile(r"_quantizer\.|\._amax$")
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state")
_OF_ADAPTER = re.compile(r"\.adapters?\.")
"""In the names that Megatron-Bridge gives the tensors of LoRA, DoRA and CanonicalLoRA."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronCheckpoint:
    """A `torch_dist` checkpoint, read in this process.

    Args:
        path: the folder that `--save` named (the latest checkpoint is read), or the folder of one iteration in it.

    Attributes:
        path: the folder of the iteration.
        names: every weight of the model, without the optimizer, in the order of layers.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = self._folder(Path(path))
        self._reader = FileSystemReader(str(self.path))
        with reading(self.path / ".metadata"):
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._stored: dict[str, TensorStorageMetadata] = {
                name: entry
                for name, entry in self._metadata.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata) and not _NOT_WEIGHTS.match(name)
            }
            sizes = {name: tuple(entry.size) for name, entry in self._stored.items()}
            dtypes = {name: torch.empty(0, dtype=e.properties.dtype).dtype for name, e in self._stored.items()}
            cut = [
                place.relative_path
                for index, place in self._metadata.storage_data.items()
                if index.fqn in self._stored
                and (self.path / place.relative_path).stat().st_size < place.offset + place.length
            ]
        if adapted := next(filter(_OF_ADAPTER.search, self._stored), None):
            raise ValueError(
                f"{self.path} must hold whole weights; got weights of an adapter of Megatron-Bridge ({adapted}): "
                "convert the adapter with AutoBridge.export_adapter_ckpt, merge with peft, see docs/update.md#with-lora"
            )
        if cut:
            raise ValueError(f"{self.path / cut[0]} was cut short: copy or save the checkpoint again")
        self._check_unquantized()
        self._pieces = self._found(sizes)
        self.names: dict[str, TensorInfo] = {
            name: TensorInfo(
                tuple(max(p.offset[axis] + p.shape[axis] for p in pieces) for axis in range(len(pieces[0].shape))),
                dtypes[pieces[0].stored],
            )
            for name, pieces in sorted(self._pieces.items(), key=lambda item: in_order(item[0]))
        }
        for name, info in self.names.items():
            if sum(math.prod(piece.shape) for piece in self._pieces[name]) != math.prod(info.shape):
                raise ValueError(f"{self.path} is not whole: it holds only a part of {name}")

    def _check_unquantized(self) -> None:
        quantizer = next((name for name in self._stored if _QUANTIZER.search(name)), None)
        if quantizer is None and not (self.path / MODELOPT_STATE).exists():
            return
        said = f"{self.path} must hold unquantised weights; got {quantizer or MODELOPT_STATE} of ModelOpt: give the "
        said += "checkpoint as it was before quantisation"
        if quantizer is None:
            # without quantisers, the weights can be those of a model that ModelOpt only pruned
            said += f"; of a model that ModelOpt only pruned, remove the folder {MODELOPT_STATE}"
        raise ValueError(said)

    def _folder(self, path: Path) -> Path:
        """The folder with the checkpoint's metadata."""
        folder = tracked_folder(path) or path
        if not folder.is_dir():
            raise ValueError(f"{path} must hold a checkpoint; {folder} does not exist: name another folder")
        with reading(folder / "metadata.json"):
            config = maybe_load_config(str(folder))
        if config is None and (folder / ".metadata").exists():
            raise ValueError(
                f"{folder} is not a torch_dist checkpoint: convert a checkpoint of Megatron-FSDP (--ckpt-format "
                f"fsdp_dtensor) with python -m emo_megatron.checkpoint.fsdp --checkpoint {path} --output NEW_FOLDER"
            )
        if config is None or config.sharded_backend != "torch_dist":
            raise ValueError(
                f"{folder} is not a torch_dist checkpoint: name the folder that --save wrote, with {TRACKER}, or the "
                "folder of one iteration; convert other formats with Megatron's --ckpt-convert-format torch_dist"
            )
        return folder

    def _found(self, sizes: dict[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
        return pieces_of(sizes)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The content of the checkpoint that is not tensors, read by Megatron's own reader: args, iteration, ..."""
        # the file of earlier versions of Megatron
        file = "common.pt"
        if not (self.path / file).exists():
            stored = self._metadata.storage_data.items()
            places = (place.relative_path for index, place in stored if index.fqn.startswith("common_state/"))
            file = next(places, ".metadata")
        with reading(self.path / file), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            return dict(load_common_state_dict(str(self.path)))

    @property
    def args(self) -> argparse.Namespace:
        """The flags of the run that wrote the checkpoint; of a Megatron-Bridge run, the flags of the same model."""
        args = self.common.get("args")
        if args is None and (self.path / RUN_CONFIG).is_file():
            args = self.common["args"] = flags_of_run(self.path / RUN_CONFIG, vocab_rows=self._vocab_rows)
        if not isinstance(args, argparse.Namespace):
            raise ValueError(f"{self.path} must hold the flags of its run, and has none: save the checkpoint again")
        lacking = [name for name in ("num_experts", "moe_router_topk") if not hasattr(args, name)]
        if lacking:
            raise ValueError(
                f"the flags in {self.path} lack {', '.join(lacking)}: the version of Megatron that wrote this "
                "checkpoint is not supported; load and save the checkpoint with a supported version"
            )
        return args

    @property
    def _vocab_rows(self) -> int:
        embedding = "embedding.word_embeddings.weight"
        rows = [int(entry.size[0]) for name, entry in self._stored.items() if name.endswith(embedding)]
        if not rows:
            raise ValueError(f"{self.path} is not whole: it holds no {embedding}")
        return rows[0]

    @cached_property
    def num_layers(self) -> int:
        """Number of layers of the decoder, without layers of multi-token prediction."""
        return count_layers(self.names)

    def layer_of(self, name: str) -> int:
        """The number of a weight's layer, from 1; 0 outside the layers."""
        return split_name(name, num_layers=self.num_layers)[0]

    @cached_property
    def routers(self) -> dict[int, str]:
        """Number of each layer with a router, from 1 -> start of the names of the router's tensors; ascending.

        Layers of multi-token prediction come last: their numbers follow the numbers of the decoder's layers.
        """
        found: dict[int, str] = {}
        for name in self.names:
            number, rest = split_name(name, num_layers=self.num_layers)
            if rest != f"{ROUTER}weight":
                continue
            if number in found:
                raise ValueError(
                    f"{self.path} must have at most one MoE layer per depth of multi-token prediction; got "
                    f"{found[number]}weight and {name}: name another checkpoint"
                )
            found[number] = name.removesuffix("weight")
        return dict(sorted(found.items()))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a router, from 1, layers of multi-token prediction included."""
        return tuple(self.routers)

    @property
    def prediction_layers(self) -> tuple[int, ...]:
        """The part of `moe_layers` that belongs to multi-token prediction."""
        return tuple(layer for layer in self.routers if layer > self.num_layers)

    @cached_property
    def fingerprint(self) -> str:
        """`router_fingerprint` of the model."""
        return router_fingerprint(self.read(f"{router}weight") for router in self.routers.values())

    def check_selection(self, selection: Selection, *, num_experts: int, parent: str | None = None) -> None:
        """Raise ValueError if a Selection is of another model than this model or, in a module, than its parent.

        `num_experts` and the fingerprint `parent` are those of the parent; None: of this model.
        """
        selection.check_model(
            parent or self.fingerprint,
            num_experts=num_experts,
            layers=self.moe_layers,
            prediction_layers=self.prediction_layers,
        )

    def read(self, name: str, index: int | slice | Sequence[int] | None = None) -> Tensor:
        """A weight, or the part weight[index] along the first axis.

        Args:
            name: one of `names`.
            index: one row (the axis is dropped), a slice, or rows in any order; None: the whole weight.
        """
        shape = self.names[name].shape
        if index is None:
            return self.read_box(name, (0,) * len(shape), shape)
        rows = range(shape[0])
        places = [index] if isinstance(index, int) else index
        chosen = list(rows[places]) if isinstance(places, slice) else [rows[place] for place in places]
        result = torch.empty((len(chosen), *shape[1:]), dtype=self.names[name].dtype)
        plan = _Plan()
        for place, row in enumerate(chosen):
            offset = (row, *(0 for _ in shape[1:]))
            self._plan(plan, name, offset, result[place : place + 1])
        self._run(plan)
        return result[0] if isinstance(index, int) else result

    def read_box(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a weight that starts at `offset` and has the shape `shape`."""
        result = torch.empty(tuple(shape), dtype=self.names[name].dtype)
        plan = _Plan()
        self._plan(plan, name, tuple(offset), result)
        self._run(plan)
        return result

    def _plan(self, plan: _Plan, name: str, offset: Sequence[int], result: Tensor) -> None:
        """Add the reads that fill `result` with the box of a weight at `offset`."""
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
        with reading(self.path / ".metadata"):
            files: dict[str, list[ReadItem]] = {}
            for item in plan.items(self._stored):
                files.setdefault(self._metadata.storage_data[item.storage_index].relative_path, []).append(item)
        for file, items in files.items():
            with reading(self.path / file):
                self._reader.read_data(LoadPlan(items), plan).wait()


class _Plan(DefaultLoadPlanner):
    """Reads into existing tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._boxes: dict[str, list[ChunkStorageMetadata]] = {}
        self._targets: dict[str, list[Tensor]] = {}

    def add(self, stored: str, offset: Sequence[int], target: Tensor) -> None:
        """Fill `target` with the box of the stored tensor that starts at `offset`."""
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=target.shape)
        self._boxes.setdefault(stored, []).append(chunk)
        self._targets.setdefault(stored, []).append(target)

    def items(self, stored: dict[str, TensorStorageMetadata]) -> list[ReadItem]:
        """The reads; all boxes of one stored tensor are matched with its chunks in one call."""
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
        """Does nothing: `tensor` is a view of the caller's tensor."""


def metadata_of(checkpoint: MegatronCheckpoint) -> ModelMetadata:
    """The metadata of a checkpoint's model that the choice of experts needs."""
    layers = checkpoint.moe_layers
    if not layers:
        raise ValueError(f"the model in {checkpoint.path} must have routed experts; it has none: name another model")
    args = checkpoint.args
    num_experts = int(args.num_experts)
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.names.items()}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name or name.endswith(".mlp.router.weight"))
    stored = {info.dtype for name, info in checkpoint.names.items() if ".mlp.experts." in name}
    return ModelMetadata(
        fingerprint=checkpoint.fingerprint,
        num_experts=num_experts,
        top_k=int(args.moe_router_topk),
        layers=layers,
        expert_parameters=routed // (len(layers) * num_experts),
        other_parameters=sum(sizes.values()) - routed,
        bytes_per_parameter=max(dtype.itemsize for dtype in stored),
    )
