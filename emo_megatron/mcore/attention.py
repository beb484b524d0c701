"""Attention inside documents, and norms that know sequence parallelism, for runs without Transformer Engine.

Megatron's own modules for the local spec refuse packed sequences, sequence parallelism and context parallelism; these
take their place in it. With Transformer Engine none is used.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from emo_megatron.config import PoolCpPartition, flag
from emo_megatron.mcore.context import partition_bounds
from emo_megatron.sharding import local_token_indices


class TorchNorm:
    """Builds torch's RMSNorm or LayerNorm with Megatron's `sequence_parallel` mark on its parameters.

    The mark makes Megatron sum these gradients over the tensor-parallel ranks, each of which saw its own part of the
    sequence. A class and not a function, because Megatron-Core 0.18 does not call a function it finds in a spec.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """The norm over the last `hidden_size` features; `unused` is what Megatron hands its own norms."""
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "--apply-layernorm-1p needs Transformer Engine or Apex; drop the flag or use "
                "--transformer-impl transformer_engine"
            )
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


_SUPPORTED = {
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
}
"""Options of Megatron's attention that DocumentAttention does not have, with the value that leaves them out."""


def require_supported(config: TransformerConfig) -> None:
    """Raise NotImplementedError for an option of Megatron's attention that DocumentAttention does not have."""
    for field, supported in _SUPPORTED.items():
        if getattr(config, field, supported) != supported:
            raise NotImplementedError(
                f"{flag(field)} {getattr(config, field)!r} needs Transformer Engine's attention; "
                f"use --transformer-impl transformer_engine, or {supported!r}"
            )


class DocumentAttention(torch.nn.Module):
    """Causal attention in which a token sees its own document only, through torch's scaled dot product.

    Stands in for Megatron's DotProductAttention: the constructor takes what that takes, and `cp_partition`, how packed
    micro-batches are cut over context-parallel ranks (PoolConfig.pool_cp_partition). Every rank holds its own heads
    (tensor parallelism) of its own tokens (context parallelism), and gathers the keys and values of the others: simple
    and exact, not made for long sequences.

    Raises:
        NotImplementedError: on construction, for an option of Megatron's attention it does not have.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        cp_partition: PoolCpPartition = "sample",
        **unused: Any,
    ) -> None:
        super().__init__()
        require_supported(config)
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(
                f"attention is causal here; the spec asks for {attn_mask_type}"
            )
        self.softmax_scale = softmax_scale
        self.cp_partition = cp_partition
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
            self.cp_group = groups.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [t, heads, head_dim] for packed sequences (t tokens of the whole micro-batch, or this
                context-parallel rank's), else [s, b, heads, head_dim]; key and value alike, with the same or fewer
                heads.
            attention_mask: unused; the mask is causal within documents.
            attn_mask_type: unused, likewise.
            attention_bias: must be None.
            packed_seq_params: document boundaries; None means one document a sample.

        Returns:
            [t, heads * head_dim] or [s, b, heads * head_dim].
        """
        if attention_bias is not None:
            raise NotImplementedError("an attention bias needs Transformer Engine's attention")
        if self.cp_group is not None:
            return self._across_ranks(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = self._attend(q, k, v, None)
            return out.permute(2, 0, 1, 3).flatten(2)
        num_tokens = query.shape[0]
        rows = num_tokens // (getattr(packed_seq_params, "tokens_per_sample", None) or num_tokens)
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
        out = self._attend(q, k, v, _document_mask(packed_seq_params, rows, num_tokens))
        return out.transpose(1, 2).reshape(num_tokens, -1)

    def _across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams | None
    ) -> Tensor:
        """Attention of this rank's tokens to everybody's."""
        assert self.cp_group is not None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        num_tokens = query.shape[0] * size
        bounds = None if packed is None else partition_bounds(packed, self.cp_partition)
        positions_RT = [
            local_token_indices(
                num_tokens=num_tokens,
                cp_rank=r,
                cp_size=size,
                document_bounds=bounds,
                device=query.device,
            )
            for r in range(size)
        ]
        order_T = torch.cat(positions_RT).argsort()
        k, v = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[order_T]
            for x in (key, value)
        )
        if packed is None:
            visible = query.new_ones(num_tokens, num_tokens, dtype=torch.bool).tril()
            query, k, v = (x.permute(1, 2, 0, 3) for x in (query, k, v))
        else:
            visible = _document_mask(packed, 1, num_tokens)[0, 0]
            query, k, v = (x.transpose(0, 1)[None] for x in (query, k, v))
        out = self._attend(query, k, v, visible[positions_RT[rank]])
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out if packed is None else out[:, 0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        # tensor-parallel ranks hold different heads and must drop different entries
        apart = get_cuda_rng_tracker().fork() if dropout else contextlib.nullcontext()
        with apart:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=visible is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, with the whole gradient of the positional key under tensor parallelism.

    All heads share that key. Megatron gathers it from the ranks' parts of the down projection, and in backward takes
    this rank's heads' share of its gradient for the sum over all heads (NVIDIA/Megatron-LM issue 1699). Cut along
    the sequence, as the output of Transformer Engine's duplicated projection is, the key is gathered in a way whose
    backward sums. Without sequence parallelism there is no training to repair: Megatron's MoE layer refuses it.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        size = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        if self.config.sequence_parallel and kv_combined.size(-1) != size:
            kv_combined = scatter_to_sequence_parallel_region(
                gather_from_tensor_model_parallel_region(kv_combined, group=self.pg_collection.tp),
                group=self.pg_collection.tp,
            )
        return q_compressed, kv_combined


def _document_mask(packed: PackedSeqParams, rows: int, num_tokens: int) -> Tensor:
    """[rows, 1, s, s] bool, True = visible: same document and not later. Built once a micro-batch."""
    cached = getattr(packed, "emo_document_mask", None)
    if cached is not None:
        return cached
    bounds = packed.cu_seqlens_q_padded
    if bounds is None:
        bounds = packed.cu_seqlens_q
    positions = torch.arange(num_tokens, device=bounds.device, dtype=bounds.dtype)
    ids = torch.searchsorted(bounds[1:], positions, right=True).view(rows, 1, -1)
    visible = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril()
    packed.emo_document_mask = visible
    return visible
