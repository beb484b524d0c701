"""Samples and micro-batches of pretraining on megatron.training, with document boundaries on every pipeline stage.

Tensor-parallel rank 0 of every stage loads samples, so the routers of middle stages get the boundaries too. With
attention inside documents, context parallelism cuts each document. Documents are padded first (padding.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from emo_megatron.documents import DocumentSegments
from emo_megatron.mcore.combinations import are_for_routers, is_padded
from emo_megatron.mcore.padding import (
    Packing,
    cut_by_document,
    longest_padded,
    packed_params,
    padded_bounds,
    padding_multiple,
)
from emo_megatron.mcore.router_documents import RouterDocuments, merged_bounds

TOKEN_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
BATCH_KEYS = (*TOKEN_KEYS, "cu_seqlens", "max_seqlen")

NUM_PADDING = "num_padding"
"""Key of a sample: number of padding tokens at the end. Key of a micro-batch with document boundaries: [mbs] int64."""

ROUTER_BOUNDS = "router_bounds"
"""Key of document boundaries for the routers only. In a sample: [S + 1] int32 from 0 to S, filled up with S. In a
micro-batch: [D + 1] int64."""

PADDED_BOUNDS = "padded_bounds"
"""Key of a micro-batch whose documents were padded: padded boundaries, int64, [D + 1] or [D + 2] (--max-documents)."""
PADDED_TOKENS = "padded_tokens"
"""Key of a micro-batch whose documents were padded: tokens of all context-parallel ranks, padding included, an int."""


class _TellsPadding:
    """Mix-in of a GPTDataset: samples also report the number of padding tokens at their end (NUM_PADDING).

    Megatron counts padding to the last document. With `gives_router_bounds` samples also have ROUTER_BOUNDS.
    """

    _num_fetched = 0
    _lengths: tuple[int, ...] = ()

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)  # type: ignore[misc]
        # Megatron changes the list
        self._num_fetched, self._lengths = sum(lengths), tuple(lengths)
        return text, documents, lengths

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)  # type: ignore[misc]
        num_tokens = len(sample["tokens"])
        num_real = 0 if idx is None else min(self._num_fetched, num_tokens)
        told: dict[str, Any] = {NUM_PADDING: num_tokens - num_real}
        config = self.config  # type: ignore[attr-defined]
        if getattr(config, "gives_router_bounds", False):
            # as Megatron does: leave out the token of the last label, and count padding to the last document
            lengths = self._lengths[:-1] if self._lengths[-1] == 1 else self._lengths
            ends = torch.tensor(lengths[:-1], dtype=torch.int32).cumsum(0)
            bounds = torch.full((num_tokens + 1,), num_tokens, dtype=torch.int32)
            bounds[: 1 + len(ends)] = torch.cat([ends.new_zeros(1), ends])
            told[ROUTER_BOUNDS] = bounds
        return sample | told


@dataclass
class PoolDatasetConfig(GPTDatasetConfig):
    """Megatron's configuration, and whether samples have boundaries for the routers only."""

    gives_router_bounds: bool = False


class PoolGPTDataset(_TellsPadding, GPTDataset):
    """Megatron's dataset, whose samples also report their padding."""


class PoolMockGPTDataset(_TellsPadding, MockGPTDataset):
    """Megatron's mock dataset, whose samples also report their padding."""


class PoolSFTDataset(SFTDataset):
    """Megatron's dataset of conversations, whose samples also report their padding.

    A document is a conversation, cut at the end of the sample. Megatron counts padding to the last conversation.
    """

    def __getitem__(self, idx: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        messages = self.dataset[int(self.indices[idx % len(self.indices)])]
        conversations = self._split_conversations(messages)
        start = int(sample["cu_seqlens"][len(conversations) - 1])
        num_tokens = len(sample["tokens"])
        if start >= num_tokens:
            return sample | {NUM_PADDING: 0}
        # the token does not identify padding: it may be the end-of-document token, which also ends conversations
        last, _ = self.config.tokenizer.tokenize_conversation(
            conversations[-1], return_target=True, add_generation_prompt=False
        )
        return sample | {NUM_PADDING: num_tokens - min(start + len(last), num_tokens)}


def has_documents(args: Any) -> bool:
    """Whether batches carry document boundaries."""
    return bool(args.dataloader_inter_document_masking or are_for_routers(args))


def needs_tokens(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this stage embeds tokens or computes a loss."""
    return is_first_or_last_pipeline_stage(vp_stage) or predicts_further(config, vp_stage)


def predicts_further(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this stage has layers of multi-token prediction."""
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(data_iterator: Iterator[Any] | None, config: TransformerConfig, vp_stage: int | None) -> dict[str, Any]:
    """This stage's part of the next micro-batch.

    Returns:
        BATCH_KEYS -> tensor or None; only TOKEN_KEYS, if attention has no boundaries. With document boundaries also
        NUM_PADDING; if documents were padded, also PADDED_BOUNDS and PADDED_TOKENS. Token tensors are this
        context-parallel rank's part of [1, mbs * s], or of [mbs, s] without boundaries or with ROUTER_BOUNDS. Middle
        stages get only the boundaries and NUM_PADDING. `cu_seqlens` are the boundaries before padding.
    """
    args = get_args()
    is_for_routers = are_for_routers(args)
    is_packed = not is_for_routers and args.dataloader_inter_document_masking
    has_tokens = needs_tokens(config, vp_stage)
    if not (is_for_routers or is_packed or has_tokens):
        return dict.fromkeys(BATCH_KEYS)
    loaded: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None, "the dataset must be built on every pipeline stage"
        loaded = next(data_iterator)
        if is_for_routers and ROUTER_BOUNDS not in loaded:
            raise ValueError(
                f"a batch must have {ROUTER_BOUNDS!r} with --pool-documents routers; got {sorted(loaded)}: build the "
                "datasets with emo_megatron.mcore.train.datasets_provider"
            )
        _check_tokens(loaded, seq_length=args.seq_length)
        if is_for_routers or is_packed:
            _check_documents(loaded[ROUTER_BOUNDS if is_for_routers else "cu_seqlens"], seq_length=args.seq_length)
    if is_packed:
        batch = _on_this_tp_rank(loaded, BATCH_KEYS, config, vp_stage)
        batch = flatten_batch_for_packed_sequences(batch) | {NUM_PADDING: _num_padding(loaded)}
        return _padded(batch) if is_padded(args) else batch
    documents = _broadcast_documents(loaded) if is_for_routers else {}
    if not has_tokens:
        return dict.fromkeys(BATCH_KEYS) | documents
    batch = _on_this_tp_rank(loaded, TOKEN_KEYS, config, vp_stage)
    # keep the two pieces of each sample that belong to this context-parallel rank
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return batch | documents


def _padded(batch: dict[str, Any]) -> dict[str, Any]:
    """Pad the documents of a packed micro-batch, and keep this context-parallel rank's part of every document."""
    args = get_args()
    cp_size = args.context_parallel_size
    tp_size = args.tensor_model_parallel_size if args.sequence_parallel else 1
    multiple = padding_multiple(cp_size=cp_size, tp_size=tp_size)
    cu_seqlens, num_packed = batch["cu_seqlens"][0], len(batch[NUM_PADDING]) * args.seq_length
    # scripts that use this module may lack this flag
    most = getattr(args, "max_documents", None)
    if most is None:
        bounds = padded_bounds(cu_seqlens, multiple=multiple)
        num_tokens = int(bounds[-1])
    else:
        num_tokens = longest_padded(num_packed, max_documents=most, multiple=multiple)
        bounds = padded_bounds(cu_seqlens, multiple=multiple, num_tokens=num_tokens)
        if bounds[-2] > num_tokens:
            raise ValueError(
                f"--max-documents {most} leaves room for {num_tokens} tokens per micro-batch; got a micro-batch of "
                f"{len(cu_seqlens) - 1} documents, which need {int(bounds[-2])} tokens. Give a larger --max-documents"
            )
    cut = cut_by_document(
        batch,
        TOKEN_KEYS,
        cu_seqlens=cu_seqlens,
        bounds=bounds,
        num_tokens=num_tokens,
        cp_rank=mpu.get_context_parallel_rank(),
        cp_size=cp_size,
    )
    return cut | {PADDED_BOUNDS: bounds, PADDED_TOKENS: num_tokens}


def _broadcast_documents(loaded: dict[str, Any]) -> dict[str, Any]:
    """ROUTER_BOUNDS and NUM_PADDING of the samples that tensor-parallel rank 0 loaded; `loaded` is empty elsewhere."""
    num_bounds = torch.zeros(1, dtype=torch.int64, device="cuda")
    bounds = torch.empty(0)
    if loaded:
        # on the host, because counting documents on the device would wait for the device
        bounds = merged_bounds(loaded[ROUTER_BOUNDS])
        num_bounds.fill_(len(bounds))
        bounds = bounds.cuda(non_blocking=True)
    _broadcast(num_bounds)
    if not loaded:
        bounds = torch.empty(int(num_bounds.item()), dtype=torch.int64, device="cuda")
    _broadcast(bounds)
    return {ROUTER_BOUNDS: bounds, NUM_PADDING: _num_padding(loaded)}


def _num_padding(loaded: dict[str, Any]) -> Tensor:
    num_padding_B = torch.zeros(get_args().micro_batch_size, dtype=torch.int64, device="cuda")
    if loaded:
        num_padding_B = loaded[NUM_PADDING].cuda(non_blocking=True)
    _broadcast(num_padding_B)
    return num_padding_B


def _on_this_tp_rank(
    loaded: dict[str, Any], keys: tuple[str, ...], config: TransformerConfig, vp_stage: int | None
) -> dict[str, Any]:
    """The tensors of `keys` that tensor-parallel rank 0 loaded, as far as this pipeline stage needs them."""
    args = get_args()
    return get_batch_on_this_tp_rank(
        {key: loaded[key].cuda(non_blocking=True) for key in keys if loaded},
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens="cu_seqlens" in keys,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        # above 1 this function would look for documents that the dataset padded
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_further(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )


def _broadcast(values: Tensor) -> None:
    """Copy the values of tensor-parallel rank 0 to all tensor-parallel ranks."""
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            values, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group()
        )


def router_documents(batch: dict[str, Any]) -> RouterDocuments | None:
    """The micro-batch's document boundaries for the routers only; None if there are no such boundaries."""
    if batch.get(ROUTER_BOUNDS) is None:
        return None
    return RouterDocuments(
        cu_seqlens=batch[ROUTER_BOUNDS], tokens_per_sample=get_args().seq_length, num_padding_B=batch[NUM_PADDING]
    )


def _check_tokens(loaded: dict[str, Any], *, seq_length: int) -> None:
    """Raise ValueError for samples that the loader cut or padded: boundaries would belong to other tokens."""
    lengths = {key: loaded[key].shape[-1] for key in TOKEN_KEYS}
    if set(lengths.values()) != {seq_length}:
        raise ValueError(
            f"a loaded sample must have --seq-length {seq_length} entries per key; got {lengths}: the loader must "
            "neither pad nor cut samples, because this package does"
        )
    if loaded.get("cu_seqlens_padded") is not None:
        raise ValueError(
            "a loaded sample must not have cu_seqlens_padded: this package pads documents for --context-parallel-size, "
            "and padding from the loader would be routed like text; load samples without padding between documents"
        )


def _check_documents(cu_seqlens: Tensor, *, seq_length: int) -> None:
    """Raise ValueError for impossible boundaries, on the host, where the check does not wait for the device."""
    for sample in cu_seqlens.reshape(-1, cu_seqlens.shape[-1]):
        DocumentSegments.from_cu_seqlens(sample, num_tokens=seq_length)
        if sample[-1] != seq_length:
            raise ValueError(
                f"cu_seqlens of a sample must end at --seq-length {seq_length}; got {int(sample[-1])}: later tokens "
                "would be in no document, and this package adds the padding between documents"
            )


def packed_documents(batch: dict[str, Any]) -> PackedSeqParams | None:
    """The micro-batch's document boundaries as PackedSeqParams for Megatron's layers; None without boundaries."""
    if batch.get("cu_seqlens") is None:
        return None
    args = get_args()
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)
    bounds: Tensor | None = batch.get(PADDED_BOUNDS)
    longest = batch["max_seqlen"].item() if bounds is None else bounds.diff().max().item()
    packing = Packing(
        cu_seqlens=cu_seqlens,
        tokens_per_sample=args.seq_length,
        num_samples=len(batch[NUM_PADDING]),
        num_padding_B=batch[NUM_PADDING],
    )
    return packed_params(packing, longest=int(longest), bounds=bounds)
