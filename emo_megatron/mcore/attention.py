"""Attention inside documents, for runs without Transformer Engine.

Megatron's own attention of the local spec does not support packed sequences, sequence parallelism or context
parallelism. The local spec uses the classes of this file instead. Runs with Transformer Engine use none of them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from emo_megatron.config import PoolCpPartition
from emo_megatron.mcore.local import NormedLinear
from emo_megatron.mcore.padding import partition_bounds
from emo_megatron.sharding import local_token_indices


def require_supported(config: TransformerConfig) -> None:
    """Raise NotImplementedError for the option of Megatron's attention that DocumentAttention does not support."""
    if config.apply_query_key_layer_scaling:
        raise NotImplementedError(
            "--apply-query-key-layer-scaling needs Transformer Engine's attention; use --transformer-impl "
            "transformer_engine, or drop the flag"
        )


class DocumentAttention(torch.nn.Module):
    """Causal attention in which a token sees only its own document, through torch's scaled dot product.

    Replaces Megatron's DotProductAttention, including sliding windows and softmax types. The constructor takes the
    arguments of DotProductAttention and `cp_partition`, which says how packed micro-batches are cut over
    context-parallel ranks (PoolConfig.pool_cp_partition). Each rank computes its own heads (tensor parallelism) of its
    own tokens (context parallelism). Each rank gathers the keys and values of all context-parallel ranks. The result
    is exact, but the method is not made for long sequences.

    Attributes:
        softmax_offset: [heads of this rank], the logit of an additional key without a value, which takes a share of
            every softmax. With --softmax-type learnable: a parameter, under Megatron's name. With off-by-one: zeros.
            Otherwise: None.
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
        if attn_mask_type is not AttnMaskType.causal:
            raise NotImplementedError(f"attn_mask_type of the spec must be AttnMaskType.causal; got {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.cp_partition = cp_partition
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp", "tp"])
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None
        self.tp_group = groups.tp
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window_size = config.window_size if has_window else None
        self.softmax_offset: Tensor | None = None
        if config.softmax_type != "vanilla":
            self._add_offset(config)
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
        """Compute causal attention inside documents.

        Args:
            query: [t, heads, head_dim] for packed sequences (t: this context-parallel rank's tokens of the
                micro-batch), else [s, b, heads, head_dim].
            key, value: shaped like query, with the same number of heads or fewer.
            attention_mask, attn_mask_type: unused; the mask is causal within documents.
            attention_bias: must be None.
            packed_seq_params: document boundaries; None means one document per sample.

        Returns:
            [t, heads * head_dim] or [s, b, heads * head_dim].
        """
        if attention_bias is not None:
            raise NotImplementedError("attention_bias must be None with --transformer-impl local")
        num_tokens, packed, rows = query.shape[0], packed_seq_params, 1
        if self.cp_group is not None:
            key, value, own_T = self._of_all_ranks(key, value, packed)
            visible: Tensor | None = self._visible(key, packed, rows)[:, :, own_T]
        elif packed is not None:
            rows = num_tokens // (getattr(packed, "tokens_per_sample", None) or num_tokens)
            visible = self._visible(key, packed, rows)
        else:
            is_plain = self.window_size is None and self.softmax_offset is None
            visible = None if is_plain else self._visible(key, None, rows)
        if packed is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(q, k, v, visible).permute(2, 0, 1, 3).flatten(2)
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
        return self._attend(q, k, v, visible).transpose(1, 2).reshape(num_tokens, -1)

    def _of_all_ranks(
        self, key: Tensor, value: Tensor, packed: PackedSeqParams | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The keys and values [t or s, ...] of all context-parallel ranks, and the positions of this rank's tokens."""
        assert self.cp_group is not None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        num_tokens = key.shape[0] * size
        bounds = None if packed is None else partition_bounds(packed, self.cp_partition)
        positions_RT = [
            local_token_indices(
                num_tokens=num_tokens, cp_rank=r, cp_size=size, document_bounds=bounds, device=key.device
            )
            for r in range(size)
        ]
        order_T = torch.cat(positions_RT).argsort()
        k, v = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.cp_group)[order_T] for x in (key, value)
        )
        return k, v, positions_RT[rank]

    def _visible(self, keys: Tensor, packed: PackedSeqParams | None, rows: int) -> Tensor:
        """[rows or 1, 1, s, s] bool, True = visible, for `rows` samples with `keys` [t or s, ...] of all ranks."""
        if packed is None:
            size = len(keys)
            visible = keys.new_ones(1, 1, size, size, dtype=torch.bool).tril()
        else:
            visible = _document_mask(packed, rows, len(keys))
        if self.window_size is None or self.window_size[0] < 0:
            return visible
        # the causal mask hides later keys already, so the right side of the window has no effect
        return visible.triu(-self.window_size[0])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        if self.softmax_offset is not None:
            assert visible is not None
            # an additional key of zeros: the score of this key is the offset alone, and its value adds nothing
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
            offset = self.softmax_offset.to(q.dtype).view(1, -1, 1, 1)
            shape = (bias.shape[0], offset.shape[1], bias.shape[2])
            visible = torch.cat([bias.expand(*shape, -1), offset.expand(*shape, 1)], dim=-1)
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

    def _add_offset(self, config: TransformerConfig) -> None:
        """Draw the offsets of all heads on every rank and keep the rank's own. The layout then does not change them."""
        offsets = torch.zeros(config.num_attention_heads, device=torch.cuda.current_device(), dtype=config.params_dtype)
        if config.softmax_type == "learnable" and config.perform_initialization:
            config.init_method(offsets)
        own = offsets.chunk(self.tp_group.size())[self.tp_group.rank()].clone()
        if config.softmax_type == "off-by-one":
            self.softmax_offset = own
            return
        self.softmax_offset = torch.nn.Parameter(own)
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Megatron's sharded state: the learnable offsets, split by heads over tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention without Transformer Engine: whole gradients, and norms of uncompressed queries.

    All heads share the rotary part of the key. Megatron gathers this part from the tensor-parallel ranks' shares of the
    down projection. In backward, Megatron takes the gradient of this rank's heads for the sum over all heads
    (NVIDIA/Megatron-LM issue 1699). This class splits the output of the down projection along the sequence, as
    Transformer Engine's duplicated projection does. Megatron then gathers by a function whose backward sums over the
    ranks. Tensor parallelism without sequence parallelism needs no repair: Megatron's MoE layer does not train then.

    If queries are not compressed, --qk-layernorm norms the input of the query projection. Megatron does so from 0.19
    on, through a projection of Transformer Engine that contains the norm. NormedLinear is that projection here.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        is_compressed = self.config.q_lora_rank is not None
        if is_compressed or not self.config.qk_layernorm or submodules.linear_q_proj is not ColumnParallelLinear:
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": NormedLinear,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }

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
    """[rows, 1, s, s] bool, True = visible: same document and not later. Built once per micro-batch."""
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
