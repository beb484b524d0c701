"""Multi-token prediction: pools in its layers, and a roll that moves all packed documents at once.

For every tensor of every depth Megatron rolls documents one by one: two slices per document and, under context
parallelism, up to four messages. Here a roll is a few operations and one collective of the first tokens of documents.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.compat import is_in_backward
from emo_megatron.mcore.layer import PoolTransformerLayer
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.spec_rewrite import pool_layer, with_torch_norms

_HOST_ROLL: Any = getattr(multi_token_prediction, "_roll_tensor_packed_seq", None)
_HOST_PARAMETERS = ("tensor", "shifts", "dims", "packed_seq_params", "cp_group")


class PoolMTPLayer(MultiTokenPredictionLayer):
    """A layer of multi-token prediction, for one depth or for all depths, that sets its router's depth.

    In a hybrid model the layers of one depth are a stack, which Megatron numbers from 1 at every depth. With
    mtp_use_repeated_layer one layer runs once per depth. Forward passes start at depth 1. Recompute in backward starts
    at the last depth, because the input of each depth is the output of the previous depth.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        routers = [module for module in self.modules() if isinstance(module, PoolRouter)]
        if len(routers) > 1:
            raise ValueError(
                "--hybrid-layer-pattern must have at most one MoE layer (E) per depth of multi-token prediction; got "
                f"{len(routers)}. Megatron reports only one MoE layer per depth"
            )
        for router in routers:
            # a hybrid stack does not set these on its MoE layer
            router.is_mtp_layer = True
            router.set_layer_number(self.layer_number)
        if self.config.recompute_granularity == "full":
            # in backward, full recompute runs a hybrid stack's layers twice: for the depth, and again for the stack
            for layer in getattr(self.mtp_model_layer, "layers", ()):
                layer.num_recomputed = 2
        self._routers = routers
        self._num_forward = self._num_backward = 0

    def _proj_and_transformer_layer(self, *args: Any, **kwargs: Any) -> Tensor:
        # Megatron sets current_microbatch on the stack, but not on the layers of the stack
        for layer in getattr(self.mtp_model_layer, "layers", ()):
            layer.current_microbatch = getattr(self.mtp_model_layer, "current_microbatch", 0)
        if self.config.mtp_use_repeated_layer:
            depth = self._next_depth()
            for router in self._routers:
                router.set_layer_number(depth)
        return super()._proj_and_transformer_layer(*args, **kwargs)

    def _next_depth(self) -> int:
        num_depths = self.config.mtp_num_layers
        if is_in_backward():
            self._num_backward = self._num_backward % num_depths + 1
            return num_depths + 1 - self._num_backward
        self._num_forward = self._num_forward % num_depths + 1
        return self._num_forward


def pool_mtp_block(
    block: MultiTokenPredictionBlockSubmodules, *, config: TransformerConfig, pool: PoolConfig
) -> MultiTokenPredictionBlockSubmodules:
    """The block with pools in every MoE layer; layers that already have pools stay unchanged."""
    layers = [_pool_mtp_layer(layer, config, pool) for layer in block.layer_specs or ()]
    return dataclasses.replace(block, layer_specs=layers)


def _pool_mtp_layer(layer: ModuleSpec, config: TransformerConfig, pool: PoolConfig) -> ModuleSpec:
    if get_module(layer) not in (MultiTokenPredictionLayer, PoolMTPLayer):
        raise ValueError(
            "the layers of multi-token prediction must be Megatron's MultiTokenPredictionLayer; got "
            f"{layer.module}. Use a spec of MultiTokenPredictionLayer"
        )
    submodules = with_torch_norms(layer.submodules) if config.transformer_impl == "local" else layer.submodules
    inner = submodules.mtp_model_layer
    # None in a hybrid model, which builds a stack of decoder layers instead
    if inner is not None and not issubclass(get_module(inner), PoolTransformerLayer):
        inner = pool_layer(inner, config=config, pool=pool)
        submodules = dataclasses.replace(submodules, mtp_model_layer=inner)
    return dataclasses.replace(layer, module=PoolMTPLayer, submodules=submodules)


def use_packed_roll() -> None:
    """Make Megatron roll packed documents with `roll_packed`; no change if Megatron's roll has another signature."""
    if _HOST_ROLL is not None and tuple(inspect.signature(_HOST_ROLL).parameters) == _HOST_PARAMETERS:
        multi_token_prediction._roll_tensor_packed_seq = roll_packed


def roll_packed(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every document's tokens one place to the left and set the last place to 0, as Megatron's roll does.

    Args:
        tensor: [..., T / cp_size], this rank's tokens, of any dtype. Tokens after the last document stay unchanged.
        shifts: -1.
        dims: the last dimension.
        packed_seq_params: cu_seqlens_q [D + 1] are the boundaries of all ranks' documents; documents may be empty. With
            context parallelism each length is a multiple of 2 * cp_size, and rank r holds pieces r and
            2 * cp_size - 1 - r of every document (sharding.py). With another cp_partition_mode Megatron's roll is
            called.
        cp_group: the context-parallel group; None: one rank.

    Returns:
        The rolled tensor and its sum.
    """
    mode = getattr(packed_seq_params, "cp_partition_mode", None)
    if shifts != -1 or dims not in (-1, tensor.dim() - 1) or mode not in (None, "zigzag"):
        return _HOST_ROLL(tensor, shifts, dims, packed_seq_params, cp_group)
    bounds = packed_seq_params.cu_seqlens_q.long()
    num_local = tensor.shape[-1]
    if num_local == 0 or len(bounds) < 2:
        return tensor.clone(), tensor.sum()
    cp_size = 1 if cp_group is None else cp_group.size()
    if cp_size == 1:
        bounds = bounds.clamp(max=num_local)
        next_P = tensor.new_zeros(*tensor.shape[:-1], len(bounds) - 1)
    else:
        bounds = _piece_bounds(bounds, cp_size).clamp(max=num_local)
        next_P = _first_of_next_piece(tensor[..., bounds[:-1].clamp(max=num_local - 1)], cp_group)
    place_T = torch.arange(num_local, device=tensor.device)
    # an empty piece ends where the previous piece ends, so that no token is assigned to the empty piece
    piece_T = torch.searchsorted(bounds[1:], place_T, right=True).clamp(max=len(bounds) - 2)
    is_last_T = bounds[1:][piece_T] == place_T + 1
    moved = torch.where(is_last_T, next_P[..., piece_T], tensor.roll(-1, dims=-1))
    moved = torch.where(place_T < bounds[-1], moved, tensor)
    return moved, moved.sum()


def _piece_bounds(bounds: Tensor, cp_size: int) -> Tensor:
    """[2 D + 1] int64: boundaries, in a rank's tokens, of the two pieces that the rank holds of each document."""
    if bounds.device.type == "cpu" and (bounds % (2 * cp_size)).any():
        raise ValueError(
            f"documents cut over {cp_size} context-parallel ranks must have lengths that are multiples of "
            f"{2 * cp_size}; got boundaries {bounds.tolist()} in cu_seqlens_q. Pad the documents."
        )
    local = bounds // cp_size
    middle_D = (local[:-1] + local[1:]) // 2
    return torch.cat([torch.stack([local[:-1], middle_D], dim=1).flatten(), local[-1:]])


def _first_of_next_piece(first_P: Tensor, cp_group: Any) -> Tensor:
    """[..., 2 D]: the token after each of this rank's pieces, 0 after the last piece of a document.

    Ranks 0 .. cp_size - 1 hold the pieces of a document's first half in order, and the pieces of the second half in
    reverse order. The next rank holds the piece after a first piece; the previous rank the piece after a second piece.

    Args:
        first_P: [..., 2 D], the first token of each of this rank's pieces.
        cp_group: the context-parallel group.
    """
    rank, size = cp_group.rank(), cp_group.size()
    # gathered as bytes, because not every backend supports every dtype
    sent = first_P.contiguous().view(torch.uint8)
    received = sent.new_empty(size * sent.shape[0], *sent.shape[1:])
    dist.all_gather_into_tensor(received, sent, group=cp_group)
    first_RP = received.view(first_P.dtype).view(size, *first_P.shape)
    behind_first_D = first_RP[rank + 1, ..., ::2] if rank < size - 1 else first_RP[rank, ..., 1::2]
    behind_second_D = first_RP[rank - 1, ..., 1::2] if rank > 0 else torch.zeros_like(behind_first_D)
    return torch.stack([behind_first_D, behind_second_D], dim=-1).flatten(-2)
