"""What a router needs to know about its micro-batch: documents, positions in training, and chosen pools.

Megatron passes document boundaries to the attention only. This file makes one PoolScope per micro-batch from the
boundaries, and stores the scope on the `packed_seq_params` object. Every layer receives this object, also in full
recompute. Boundaries for the routers only come from router_documents.py. A scope stores each layer's pools and token
counts, so recomputing a layer repeats neither the choice of pools nor the collectives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from emo_megatron import ops
from emo_megatron.balance import LayerCounts
from emo_megatron.config import PoolConfig
from emo_megatron.documents import DocumentSegments
from emo_megatron.mcore.compat import consumed_train_samples, is_in_backward
from emo_megatron.mcore.padding import PACKING, Packing, packed_places, partition_bounds, require_padded
from emo_megatron.sharding import local_token_indices


class SampleClock:
    """Number of training samples that the run consumed before this step. Pool sizes are drawn from this number.

    The clock reads the count of megatron.training. Other training loops set `consumed_samples` before every step.
    """

    is_set = True
    """Whether a training loop reports the number of consumed samples."""
    _set: int | None = None

    @property
    def consumed_samples(self) -> int:
        """Training samples consumed before this step; 0 before training."""
        if self._set is not None:
            return self._set
        count = consumed_train_samples()
        if count is None:
            warnings.warn(
                "the training loop does not report the number of consumed samples, so every step draws the same "
                "pool sizes; set emo_megatron.mcore.context.CLOCK.consumed_samples before every step",
                stacklevel=2,
            )
            # warn once, and use 0 from here on
            self._set, self.is_set = 0, False
            return 0
        return count

    @consumed_samples.setter
    def consumed_samples(self, value: int | None) -> None:
        self._set, self.is_set = value, True


CLOCK = SampleClock()
"""The clock of this process."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of a micro-batch that this rank's routers see, and the index of the micro-batch in the step."""

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    microbatch: int


@dataclass(kw_only=True)
class PoolScope:
    """One micro-batch, as seen by the routers of one pipeline stage."""

    segments: DocumentSegments
    """Documents of the whole micro-batch as packed, over all tensor- and context-parallel ranks."""
    document_ids_T: Tensor
    """[T] int64: document of each token that this rank routes; -1 for padding."""
    sample_positions_D: Tensor
    """[D] int64: position, in the order of training, of the sample that holds the document."""
    consumed_samples: int
    """Training samples consumed before this step."""
    places_T: Tensor | None = None
    """[T] int64: index in `segments` of each token that this rank routes; -1 for padding added after packing.
    None: all tokens, in order."""
    attended_ids_T: Tensor | None = None
    """[tokens of segments] int64: the document inside which each token attends; -1 for padding. None: attention and
    the token shifts of multi-token prediction cross documents."""
    sizes_LD: Tensor | None = None
    """[L, D] int64: pool sizes of all layers, drawn by fifty small operations per micro-batch instead of per layer."""
    pools: dict[int, Tensor] = field(default_factory=dict)
    """Layer number -> [D, E] bool: the pools of this micro-batch."""
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    """Layer number -> the token counts that enter the layer's losses."""
    backends: dict[int, ops.Backend] = field(default_factory=dict)
    """Layer number -> the backend of the routing ops that chose the layer's pools."""
    ids_at_depth: dict[int, Tensor] = field(default_factory=dict)
    """Depth of multi-token prediction -> [T] int64: the result of `ids_at`."""
    layers_seen: set[int] = field(default_factory=set)

    def ids_at(self, depth: int) -> Tensor:
        """[T] int64: `document_ids_T` of tokens whose document also has the token `depth` positions later, else -1.

        A layer of multi-token prediction combines both tokens. Without the later token the layer learns nothing.

        Args:
            depth: depth of the layer, from 1; 0 for a layer of the decoder.
        """
        if depth == 0 or self.attended_ids_T is None:
            return self.document_ids_T
        if depth not in self.ids_at_depth:
            attended_T = self.attended_ids_T
            later_T = F.pad(attended_T[depth:], (0, min(depth, len(attended_T))), value=-1)
            stays_T = (later_T == attended_T) & (attended_T >= 0)
            if self.places_T is not None:
                stays_T = stays_T[self.places_T.clamp(min=0)]
            self.ids_at_depth[depth] = self.document_ids_T.masked_fill(~stays_T, -1)
        return self.ids_at_depth[depth]

    def draw_sizes(self, pool: PoolConfig, *, num_layers: int, low: int, high: int, num_experts: int) -> Tensor:
        """`sizes_LD`, drawn from [low, high] at the first call."""
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
    """The scope of this forward pass. The first layer makes the scope, and the other layers find it.

    Args:
        hidden_shape: [s, b, h] of this rank's hidden states.
        layer_number: number of the calling layer. A second call by a layer outside backward means a new forward pass,
            even if the caller reuses one packed_seq_params object.
    """
    if packed_seq_params is None:
        return None
    scope: PoolScope | None = getattr(packed_seq_params, "emo_scope", None)
    if scope is None or (layer_number in scope.layers_seen and not is_in_backward()):
        scope = _scope_of_packed(packed_seq_params, hidden_shape, shard=shard, pool=pool)
        packed_seq_params.emo_scope = scope
    scope.layers_seen.add(layer_number)
    return scope


def _scope_of_packed(packed: PackedSeqParams, hidden_shape: torch.Size, *, shard: Shard, pool: PoolConfig) -> PoolScope:
    packing: Packing | None = getattr(packed, PACKING, None)
    num_tokens = hidden_shape[0] * hidden_shape[1] * shard.tp_size * shard.cp_size
    padded = packed.cu_seqlens_q_padded
    if packing is None:
        # cu_seqlens_q has the boundaries of the packing
        length = getattr(packed, "tokens_per_sample", None) or max(num_tokens, 1)
        packing = Packing(cu_seqlens=packed.cu_seqlens_q, tokens_per_sample=length)
        bounds = None
    else:
        if padded is not None:
            raise ValueError(
                f"packed_seq_params with {PACKING} must have the padded boundaries in cu_seqlens_q; got "
                "cu_seqlens_q_padded"
            )
        bounds = None if packed.cu_seqlens_q is packing.cu_seqlens else packed.cu_seqlens_q
    return make_scope(
        packing,
        hidden_shape=hidden_shape,
        shard=shard,
        pool=pool,
        bounds=bounds,
        cu_seqlens_padded=padded,
        cut_bounds=partition_bounds(packed, pool.pool_cp_partition),
    )


def make_scope(
    packing: Packing,
    *,
    hidden_shape: torch.Size,
    shard: Shard,
    pool: PoolConfig,
    bounds: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    cut_bounds: Tensor | None = None,
) -> PoolScope:
    """The scope of a micro-batch with this packing.

    Args:
        hidden_shape: [s, b, h] of this rank's hidden states.
        bounds: [D' + 1], D' >= D: boundaries after padding. Document d starts at bounds[d], and all tokens after the
            last document are padding. None: no padding was added to the packing.
        cu_seqlens_padded: see DocumentSegments.from_cu_seqlens; for padding inside the packing.
        cut_bounds: [D' + 1]: boundaries of the pieces that context parallelism cuts one by one. None: context
            parallelism cuts whole samples.
    """
    num_tokens = hidden_shape[0] * hidden_shape[1] * shard.tp_size * shard.cp_size
    if bounds is not None and (pool.pool_check or bounds.device.type == "cpu"):
        require_padded(packing.cu_seqlens, bounds, num_tokens=num_tokens)
    segments, attended_ids_T = _segments(
        packing, pool, num_tokens=num_tokens, bounds=bounds, cu_seqlens_padded=cu_seqlens_padded
    )
    # all tokens, in order
    places_T, ids_T = None, segments.document_ids_T
    if bounds is not None or not shard.tp_size == shard.cp_size == hidden_shape[1] == 1:
        places_T = local_token_indices(
            num_tokens=num_tokens,
            batch_size=hidden_shape[1],
            tp_rank=shard.tp_rank,
            tp_size=shard.tp_size,
            cp_rank=shard.cp_rank,
            cp_size=shard.cp_size,
            document_bounds=cut_bounds,
            device=packing.cu_seqlens.device,
        )
        if bounds is None:
            ids_T = segments.take(places_T)
        else:
            places_T = packed_places(places_T, packing.cu_seqlens, bounds)
            ids_T = segments.take(places_T.clamp(min=0)).masked_fill(places_T < 0, -1)
    samples = segments.num_tokens // segments.tokens_per_sample
    first = CLOCK.consumed_samples + (shard.microbatch * shard.dp_size + shard.dp_rank) * samples
    return PoolScope(
        segments=segments,
        document_ids_T=ids_T,
        sample_positions_D=segments.rows_D + first,
        consumed_samples=CLOCK.consumed_samples,
        places_T=places_T,
        attended_ids_T=attended_ids_T if pool.pool_documents == "attention" else None,
    )


def _segments(
    packing: Packing, pool: PoolConfig, *, num_tokens: int, bounds: Tensor | None, cu_seqlens_padded: Tensor | None
) -> tuple[DocumentSegments, Tensor]:
    """The documents of the routers, and the document ids of the attention."""
    cu_seqlens, length = packing.cu_seqlens, packing.tokens_per_sample
    if bounds is not None:
        if packing.num_samples is None:
            raise ValueError(f"{PACKING} must have num_samples, because the documents are padded; got None")
        num_tokens = packing.num_samples * length

    def segments_of(starts: Tensor) -> DocumentSegments:
        segments = DocumentSegments.from_cu_seqlens(
            starts,
            num_tokens=num_tokens,
            tokens_per_sample=length,
            cu_seqlens_padded=cu_seqlens_padded,
            check=True if pool.pool_check else None,
        )
        if packing.num_padding_B is None:
            return segments
        return segments.without_tails(packing.num_padding_B)

    segments = segments_of(cu_seqlens)
    attended_ids_T = segments.document_ids_T
    if pool.pool_eos_starts_document:
        if cu_seqlens_padded is not None:
            raise NotImplementedError(
                "--pool-eos-starts-document does not support padding between documents; drop the flag, or pass "
                "PackedSeqParams without cu_seqlens_q_padded"
            )
        segments = segments_of(_before_last_token(cu_seqlens, length))
    return segments.whole_samples() if pool.pool_scope == "sample" else segments, attended_ids_T


def _before_last_token(cu_seqlens: Tensor, tokens_per_sample: int) -> Tensor:
    """Boundaries one token earlier, so that the last token of a document (EOS) starts the next document.

    The ends of samples and of the last document stay, because boundaries do not show whether a sample ends with EOS.
    """
    is_end = (cu_seqlens % tokens_per_sample == 0) | (cu_seqlens == cu_seqlens[-1])
    return torch.where(is_end, cu_seqlens, cu_seqlens - 1)
