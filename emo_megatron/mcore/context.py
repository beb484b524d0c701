"""What a router must know about its micro-batch: whose documents, which training samples, which pools were chosen.

Megatron hands document boundaries to the attention only. A PoolScope is made from them once a micro-batch and rides on
the `packed_seq_params` object, which every layer gets, full recompute included; boundaries for the routers alone come
another way (router_documents.py). A scope remembers each layer's pool and token counts, so that recomputing a layer
repeats neither the choice nor its collectives.
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
    """How many training samples the run has consumed before this step; pool sizes are drawn from it.

    It reads megatron.training's own count. A host without that sets `consumed_samples` before every step.
    """

    is_told = True
    """Whether a training loop tells."""
    _set: int | None = None

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
    """Documents of the whole micro-batch as it was packed, all tensor- and context-parallel ranks together."""
    document_ids_T: Tensor
    """[T] int64: document of each token this rank routes, -1 for padding."""
    sample_positions_D: Tensor
    """[D] int64: place in training of the sample that holds the document."""
    consumed_samples: int
    """Training samples consumed before this step."""
    places_T: Tensor | None = None
    """[T] int64: place in `segments` of each token this rank routes, -1 for padding put in later; None: all, in order.
    """
    attended_ids_T: Tensor | None = None
    """[tokens of segments] int64: the document that attention keeps each token to, -1 for padding; None: attention
    and the rolls of multi-token prediction go across documents."""
    sizes_LD: Tensor | None = None
    """[L, D] int64, drawn pool sizes of all layers: fifty small operations once a micro-batch, not once a layer."""
    pools: dict[int, Tensor] = field(default_factory=dict)
    """Layer number -> [D, E] bool, the pools of this micro-batch."""
    counts: dict[int, LayerCounts] = field(default_factory=dict)
    """Layer number -> what its losses are made of."""
    backends: dict[int, ops.Backend] = field(default_factory=dict)
    """Layer number -> the routing ops that chose its pools."""
    ids_at_depth: dict[int, Tensor] = field(default_factory=dict)
    """Depth of multi-token prediction -> [T] int64, as `document_ids_T`."""
    layers_seen: set[int] = field(default_factory=set)

    def ids_at(self, depth: int) -> Tensor:
        """[T] int64: `document_ids_T` of the tokens that have a token so many places later in their document, else -1.

        A layer of multi-token prediction joins the two; where there is no such token it learns nothing.

        Args:
            depth: of the layer, from 1; 0 for a layer of the decoder.
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
        hidden_shape: [s, b, h] of this rank's hidden states.
        layer_number: of the asking layer. A layer that asks twice outside backward is in a new forward pass, even if
            the caller reuses one packed_seq_params object.
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
        # boundaries are the packing's own
        length = getattr(packed, "tokens_per_sample", None) or max(num_tokens, 1)
        packing = Packing(cu_seqlens=packed.cu_seqlens_q, tokens_per_sample=length)
        bounds = None
    else:
        if padded is not None:
            raise ValueError(
                f"packed_seq_params must have padded boundaries in cu_seqlens_q with {PACKING}; got cu_seqlens_q_padded"
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
    """The scope of a micro-batch that was packed like this.

    Args:
        hidden_shape: [s, b, h] of this rank's hidden states.
        bounds: [D' + 1], D' >= D: document d was moved to bounds[d] by padding behind the documents before it, and
            what lies past the last one's end is padding; None: the tokens are those of the packing.
        cu_seqlens_padded: as DocumentSegments.from_cu_seqlens takes it: the packing itself has padding.
        cut_bounds: [D' + 1], the pieces that context parallelism cuts one by one; None: it cuts whole samples.
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
    """The documents of the routers, and the ids of those that attention keeps to."""
    cu_seqlens, length = packing.cu_seqlens, packing.tokens_per_sample
    if bounds is not None:
        if packing.num_samples is None:
            raise ValueError(f"{PACKING} must say num_samples where documents are padded")
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
                "--pool-eos-starts-document needs documents without padding between them; "
                "drop the flag, or pass PackedSeqParams without cu_seqlens_q_padded"
            )
        segments = segments_of(_before_last_token(cu_seqlens, length))
    return segments.whole_samples() if pool.pool_scope == "sample" else segments, attended_ids_T


def _before_last_token(cu_seqlens: Tensor, tokens_per_sample: int) -> Tensor:
    """Boundaries one token earlier, so that a document's last token, its EOS, opens the next one.

    The ends of samples and of the last document stay: whether an EOS stands there cannot be told from boundaries.
    """
    is_end = (cu_seqlens % tokens_per_sample == 0) | (cu_seqlens == cu_seqlens[-1])
    return torch.where(is_end, cu_seqlens, cu_seqlens - 1)
