"""A model's tensors by their names in a checkpoint, whatever layout holds them: what ranks send, and how to join it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Parts = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]
"""Key, shape of the whole tensor, offset of the part in it, part."""


def _sharded(chunks: list[Any]) -> Iterator[Any]:
    """This rank's ShardedTensors of all its model chunks; their data are views of the parameters."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def initialise(chunks: list[Any], *, seed: int) -> None:
    """Give every tensor values that depend on its name, its whole shape and the seed alone."""
    with torch.no_grad():
        for shard in _sharded(chunks):
            generator = torch.Generator().manual_seed(seed + zlib.crc32(shard.key.encode()))
            whole = torch.randn(shard.global_shape, generator=generator)
            # norms stay near one, the rest is small
            whole = 1 + 0.1 * whole if "norm" in shard.key else 0.2 * whole
            part = whole[_slices(shard)]
            shard.data.copy_(part.reshape(shard.data.shape))


def parts(chunks: list[Any], *, gradients: bool = False) -> Parts:
    """This rank's tensors, or the gradients in their place, without the replicas of other ranks."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    values = {}
    if gradients:
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            values[parameter] = parameter.data
            parameter.data = parameter.main_grad
    try:
        return [
            (s.key, s.global_shape, s.global_offset, s.data.detach().clone())
            for s in _sharded(chunks)
            if is_main_replica(s.replica_id)
        ]
    finally:
        for parameter, value in values.items():
            parameter.data = value


def join(of_ranks: list[Parts]) -> dict[str, Tensor]:
    """The whole tensors; NaN where no rank held a part."""
    joined: dict[str, Tensor] = {}
    for key, shape, offset, part in (entry for entries in of_ranks for entry in entries):
        whole = joined.setdefault(key, torch.full(shape, float("nan")))
        lengths = (1,) * (len(shape) - part.dim()) + tuple(part.shape)
        place = tuple(slice(o, o + n) for o, n in zip(offset, lengths, strict=True))
        whole[place] = part.reshape(lengths)
    return joined


def deviations(want: Parts, of_ranks: list[Parts]) -> dict[str, float]:
    """Distance of every tensor, as a share of its norm; infinite where no rank held a part of it."""
    wanted, found = join([want]), join(of_ranks)
    assert found.keys() == wanted.keys()
    off = {key: (found[key] - value).norm() / value.norm().clamp(min=1e-12) for key, value in wanted.items()}
    return {key: float(share.nan_to_num(nan=torch.inf)) for key, share in off.items()}


def _slices(shard: Any) -> tuple[slice, ...]:
    lengths = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return tuple(slice(o, o + n) for o, n in zip(shard.global_offset, lengths, strict=True))
