"""Write weights as a checkpoint that stock Megatron loads with --load, under any parallel layout.

The result is a `release` checkpoint, Megatron's form for weights without a run: training starts at iteration 0 with a
fresh optimizer. Each expert is a separate chunk, so that a rank reads only the rank's own experts. A weight may be a
function, which is called for one chunk at a time. The folder appears complete or not at all. No process group is
needed.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from tqdm import tqdm

from emo_megatron.checkpoint.folders import RELEASE, TRACKER
from emo_megatron.checkpoint.names import EXPERTS, PREDICTION, count_layers, is_of_experts, split_name
from emo_megatron.files import whole
from emo_megatron.finite import check_weight

CONTENT = {
    # every layer has its own names, also in a model of equal layers
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Megatron reads this entry to find out how the names were formed."""

Note = Callable[[Path], object]
"""Writes one file."""


@dataclass(frozen=True, kw_only=True)
class LazyWeight:
    """A weight that is computed while it is written.

    Attributes:
        shape: of the whole weight.
        dtype: of the parts that `rows` returns.
        rows: returns the part [start, stop) along the first axis.
        experts: for error messages, the numbers in the source model of the experts on the first axis; empty: 0, 1, ...
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    experts: Sequence[int] = ()


def write_checkpoint(
    path: Path | str,
    weights: Mapping[str, Tensor | LazyWeight],
    *,
    args: argparse.Namespace,
    notes: Mapping[str, Note] | None = None,
) -> Path:
    """Write a checkpoint of weights.

    Args:
        path: folder for --load; must not exist.
        weights: all weights of the model, by the names of `MegatronCheckpoint.names`.
        args: parsed flags of a run of this model (num_experts, hidden_size, ...). The flags for the progress of the run
            and for the parallel layout are reset here.
        notes: more files for `path`, by name; written after all weights.
    """
    path = Path(path)
    with whole(path, is_new=True) as unfinished:
        folder = unfinished / RELEASE
        folder.mkdir(parents=True)
        _save(folder, _Writer(weights, common=_common(args)))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(config))
        for name, note in (notes or {}).items():
            note(unfinished / name)
        (unfinished / TRACKER).write_text(RELEASE)
    return path


def _save(folder: Path, planner: _Writer) -> None:
    failed: BaseException | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            # no chunk ahead: a chunk is computed after the previous chunk is written
            writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
            save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        # CheckpointException wraps every error, and is not a subclass of Exception
        failed, _ = next(iter(error.failures.values()))
    if failed is not None:
        # raised outside the except block to keep the error's own context, which holds the error of the machine
        raise failed


def _common(args: argparse.Namespace) -> dict[str, Any]:
    args = copy.copy(args)
    fresh: dict[str, Any] = {
        "iteration": 0,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
        "finetune": False,
    }
    for kind in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context"):
        fresh[f"{kind}_parallel_size"] = 1
    for name, value in fresh.items():
        setattr(args, name, value)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT}


class _Bytes(io.BytesIO):
    """Returns its bytes as a copy: garbage collection of a view that a failed write left crashes Python 3.12.1."""

    def getbuffer(self) -> Any:
        return self.getvalue()


class _Writer(DefaultSavePlanner):
    """Plans one chunk per expert and one per other weight, and computes each chunk just before writing it."""

    def __init__(self, weights: Mapping[str, Tensor | LazyWeight], *, common: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights, self._num_layers = weights, count_layers(weights)
        self._objects: dict[str, Any] = {"common_state/shard_0_1": common}
        for name, weight in weights.items():
            self._objects |= dict.fromkeys(_extra_states(name, weight.shape[0]))
        self._bar: Any = None

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self._objects]
        for name, weight in self._weights.items():
            items += _chunks(name, weight)
        self._bar = tqdm(total=len(items), desc="writing", disable=None, leave=False)
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        self._bar.update()
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            # like Megatron's writer: a list of the objects of all ranks
            buffer = _Bytes()
            torch.save([self._objects[name]], buffer)
            return buffer
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        weight, layer = self._weights[name], split_name(name, num_layers=self._num_layers)[0] or None
        if not chunk.sizes:
            assert isinstance(weight, Tensor)
            check_weight(name, weight, layer=layer)
            return weight.detach().cpu()
        start, stop = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        part = weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)
        assert part.shape == chunk.sizes, (name, part.shape, chunk.sizes)
        experts: Sequence[int] = ()
        if is_of_experts(name):
            numbers = weight.experts if isinstance(weight, LazyWeight) else ()
            experts = (numbers or range(weight.shape[0]))[start:stop]
        check_weight(name, part, layer=layer, experts=experts)
        return part.detach().cpu().contiguous()


def _chunks(name: str, weight: Tensor | LazyWeight) -> Iterator[WriteItem]:
    shape = tuple(weight.shape)
    step = 1 if EXPERTS in name else max(shape[0], 1) if shape else 1
    for start in range(0, shape[0], step) if shape else [0]:
        offset = torch.Size((start, *(0 for _ in shape[1:])) if shape else ())
        size = torch.Size((step, *shape[1:]) if shape else ())
        yield WriteItem(
            index=MetadataIndex(name, offset),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offset, sizes=size),
                properties=TensorProperties(dtype=weight.dtype),
                size=torch.Size(shape),
            ),
        )


def _extra_states(name: str, num_rows: int) -> Iterator[str]:
    """Names of the empty objects that Megatron's linear layers store with a weight (FP8 scales in models with FP8)."""
    module, _, kind = name.rpartition(".")
    is_linear = ".linear_" in module or module.endswith(".eh_proj")
    if kind != "weight" or not module.startswith(("decoder.layers.", PREDICTION)) or not is_linear:
        return
    count = num_rows if EXPERTS in name else 1
    for shard in range(count):
        yield f"{module}._extra_state/shard_{shard}_{count}"
    if module.endswith("self_attention.linear_qkv"):
        # Transformer Engine's attention also has such an object
        yield f"{module.removesuffix('linear_qkv')}core_attention._extra_state/shard_0_1"
