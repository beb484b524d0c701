"""What a router must know about its micro-batch: whose documents, which training samples, which pools were chosen.

Megatron hands document boundaries to the attention only. A PoolScope is made from them once a micro-batch and rides on
the `packed_seq_params` object, which every layer gets, full recompute included; boundaries for the routers alone come
another way (router_documents.py). A scope remembers each layer's pool and token counts, so that recomputing a layer
repeats neither the choice nor its collectives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from emo_megatron import ops
from emo_megatron.balance import LayerCounts
from emo_megatron.config import PoolConfig, PoolCpPartition
from emo_megatron.documents import DocumentSegments
from emo_megatron.mcore.compat import consumed_train_samples, is_in_backward
from emo_megatron.sharding import local_token_indices

NO_BOUNDARIES = (
    "Pools need document boundaries and this forward pass got none. Train with --dataloader-inter-document-masking, "
    "or pass PackedSeqParams to the model; with --pool-documents routers, call the model through "
    "emo_megatron.mcore.router_documents.forward_with_documents."
)

TRAILING_PADDING = "emo_num_padding_B"
"""Attribute of packed_seq_params, optional: [B] int64, tokens of padding at the end of each sample. Boundaries count
them to the last document, where attention does no harm by them; in the choice of a pool they would have a vote."""


class SampleClock:
    """How many training samples the run has consumed before this step; pool sizes are drawn from it.

    It reads megatron.training's own count. A host without that sets `consumed_samples` before every step.
    """

    def __init__(self) -> None:
        self._set: int | None = None
        self.is_told = True
        """Whether a training loop tells."""

    @property
    def consumed_samples(self) -> int:
        """Training samples, 0 before training."""
        if self._set is not None:
            return self._set
        count = consumed_train_samples()
        if count is None:
            warnings.warn(
                "no training loop tells how many samples it has consumed, so every step draws the "
                "same pool sizes; set emo_megatron.mcore.context.CLOCK.consumed_samples each step",
                stacklevel=2,
            )
            # once is enough, and 0 is what it goes on with
            self._set, self.is_told = 0, False
            return 0
        return count

    @consumed_samples.setter
    def consumed_samples(self, value: int | None) -> None:
        self._set, self.is_told = value, True


CLOCK = SampleClock()
"""The clock of this process."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of a micro-batch this rank's routers see, and which micro-batch of the step it is."""

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    microbatch: int


@dataclass(kw_only=True)
class PoolScope:
    """One micro-batch as the routers of one pipeline stage see it."""

    segments: DocumentSegments
    """Documents of the whole micro-batch, all tensor- and context-parallel ranks together."""
    document_ids_T: Tensor
    """[T] int64: document of each token this rank routes, -1 for padding."""
    sample_positions_D: Tensor
    """[D] int64: place in training of the sample that holds the document."""
    consumed_samples: int
    """Training samples consumed before this step."""
    sizes_LD: Tensor | None = None
    """[L, D] int64, drawn pool sizes of all layers: fifty small operations once a micro-batch, not once a layer."""
    pools: dict[int, Tensor] = field(default_factory=dict)
    """Layer number -> [D, E] bool, the pools of this micro-batch."""
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    """Layer number -> what its losses are made of."""
    backends: dict[int, ops.Backend] = field(default_factory=dict)
    """Layer number -> the routing ops that chose its pools."""
    layers_seen: set[int] = field(default_factory=set)

    def draw_sizes(
        self, pool: PoolConfig, *, num_layers: int, low: int, high: int, num_experts: int
    ) -> Tensor:
        """`sizes_LD`, drawn by the first layer that asks, from [low, high]."""
        if self.sizes_LD is None:
            self.sizes_LD = ops.draw_pool_sizes(
                self.sample_positions_D,
                offsets_D=self.segments.offsets_D,
                layer_number=range(1, num_layers + 1),
                seed=pool.pool_seed,
                low=low,
                high=high,
                skew=pool.pool_skew,
                unrestricted_share=pool.pool_unrestricted,
                num_experts=num_experts,
            )
        return self.sizes_LD


def scope_of(
    packed_seq_params: PackedSeqParams | None,
    *,
    hidden_shape: torch.Size,
    shard: Shard,
    pool: PoolConfig,
    layer_number: int,
) -> PoolScope | None:
    """The scope of this forward pass, made by the first layer that asks and found by the others.

    Args:
        packed_seq_params: of the micro-batch; None gives None.
        hidden_shape: [s, b, h] of this rank's hidden states.
        shard: this rank's part.
        pool: the method's configuration.
        layer_number: of the asking layer. A layer that asks twice outside backward is in a new forward pass, even if
            the caller reuses one packed_seq_params object.
    """
    if packed_seq_params is None:
        return None
    carrier: Any = packed_seq_params
    scope: PoolScope | None = getattr(carrier, "emo_scope", None)
    if scope is None or (layer_number in scope.layers_seen and not is_in_backward()):
        scope = make_scope(
            packed_seq_params.cu_seqlens_q,
            cu_seqlens_padded=packed_seq_params.cu_seqlens_q_padded,
            tokens_per_sample=getattr(packed_seq_params, "tokens_per_sample", None),
            num_padding_B=getattr(packed_seq_params, TRAILING_PADDING, None),
            hidden_shape=hidden_shape,
            shard=shard,
            pool=pool,
        )
        carrier.emo_scope = scope
    scope.layers_seen.add(layer_number)
    return scope


def make_scope(
    cu_seqlens: Tensor,
    *,
    hidden_shape: torch.Size,
    shard: Shard,
    pool: PoolConfig,
    cu_seqlens_padded: Tensor | None = None,
    tokens_per_sample: int | None = None,
    num_padding_B: Tensor | None = None,
) -> PoolScope:
    """The scope of a micro-batch with these boundaries.

    Args:
        cu_seqlens, cu_seqlens_padded, tokens_per_sample: as DocumentSegments.from_cu_seqlens takes them.
        hidden_shape: [s, b, h] of this rank's hidden states.
        shard: this rank's part.
        pool: the method's configuration.
        num_padding_B: [B] int64, tokens of padding at the end of each sample; None: none.

    Raises:
        ValueError: the boundaries do not fit the tokens.
        NotImplementedError: --pool-eos-starts-document with padding between documents.
    """
    num_tokens = hidden_shape[0] * hidden_shape[1] * shard.tp_size * shard.cp_size
    bounds = cu_seqlens
    if pool.pool_eos_starts_document:
        if cu_seqlens_padded is not None:
            raise NotImplementedError(
                "--pool-eos-starts-document needs documents without padding between them; "
                "drop the flag, or pass PackedSeqParams without cu_seqlens_q_padded"
            )
        bounds = _before_last_token(bounds, tokens_per_sample or num_tokens)
    segments = DocumentSegments.from_cu_seqlens(
        bounds,
        num_tokens=num_tokens,
        tokens_per_sample=tokens_per_sample,
        cu_seqlens_padded=cu_seqlens_padded,
        check=True if pool.pool_check else None,
    )
    if pool.pool_scope == "sample":
        segments = segments.whole_samples()
    if num_padding_B is not None:
        segments = segments.without_tails(num_padding_B)
    samples = num_tokens // segments.tokens_per_sample
    first = CLOCK.consumed_samples + (shard.microbatch * shard.dp_size + shard.dp_rank) * samples
    return PoolScope(
        segments=segments,
        document_ids_T=_local_ids(
            segments,
            hidden_shape[1],
            shard=shard,
            bounds=_cut_bounds(cu_seqlens, cu_seqlens_padded, pool.pool_cp_partition),
        ),
        sample_positions_D=segments.rows_D + first,
        consumed_samples=CLOCK.consumed_samples,
    )


def _local_ids(
    segments: DocumentSegments, batch_size: int, *, shard: Shard, bounds: Tensor | None
) -> Tensor:
    """[T] int64, the document of each token that this rank routes."""
    if shard.tp_size == shard.cp_size == batch_size == 1:
        return segments.document_ids_T
    indices_T = local_token_indices(
        num_tokens=segments.num_tokens,
        batch_size=batch_size,
        tp_rank=shard.tp_rank,
        tp_size=shard.tp_size,
        cp_rank=shard.cp_rank,
        cp_size=shard.cp_size,
        document_bounds=bounds,
        device=segments.document_ids_T.device,
    )
    return segments.take(indices_T)


def partition_bounds(packed: PackedSeqParams, partition: PoolCpPartition) -> Tensor | None:
    """[D + 1], where the documents lie that context parallelism cuts one by one; None if it cuts whole samples."""
    return _cut_bounds(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, partition)


def _cut_bounds(
    cu_seqlens: Tensor, padded: Tensor | None, partition: PoolCpPartition
) -> Tensor | None:
    if partition == "sample":
        return None
    return cu_seqlens if padded is None else padded


def _before_last_token(cu_seqlens: Tensor, tokens_per_sample: int) -> Tensor:
    """Boundaries one token earlier, so that a document's last token, its EOS, opens the next one.

    The ends of samples and of the last document stay: whether an EOS stands there cannot be told from boundaries.
    """
    is_end = (cu_seqlens % tokens_per_sample == 0) | (cu_seqlens == cu_seqlens[-1])
    return torch.where(is_end, cu_seqlens, cu_seqlens - 1)
