"""Pretraining on megatron.training: batches with document boundaries on every stage, the step, the loss, the datasets.

The pieces `megatron.training.pretrain` asks for, for plain pretraining. Unlike pretrain_gpt.py's, every pipeline stage
builds the dataset, so that the routers of middle stages see boundaries too; what that script does beyond this is in
the refusal table.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from emo_megatron.documents import DocumentSegments
from emo_megatron.mcore.context import TRAILING_PADDING
from emo_megatron.mcore.pipeline import as_exchanged, flatten_received
from emo_megatron.mcore.router_documents import (
    RouterDocuments,
    forward_with_documents,
    merged_bounds,
)
from emo_megatron.mcore.samples import (
    NUM_PADDING,
    ROUTER_BOUNDS,
    PoolDatasetConfig,
    PoolGPTDataset,
    PoolMockGPTDataset,
)
from emo_megatron.modules.json_files import read_object

SPIKY_LOSS_FACTOR = 10
"""--check-for-spiky-loss reports a loss so many times the largest seen."""
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen")


def has_documents(args: Any) -> bool:
    """Whether batches carry document boundaries."""
    return bool(args.dataloader_inter_document_masking or _are_for_routers(args))


def _are_for_routers(args: Any) -> bool:
    # a script that uses this module may have no flags of pools
    return getattr(args, "pool_documents", "attention") == "routers"


def get_batch(data_iterator: Iterator[Any] | None, vp_stage: int | None) -> dict[str, Any]:
    """This stage's part of the next micro-batch.

    Returns:
        BATCH_KEYS -> tensor or None, and NUM_PADDING with document boundaries. Token tensors are [1, mbs * s] with
        boundaries and [mbs, s] without or with ROUTER_BOUNDS, this context-parallel rank's part of them; middle
        stages get the boundaries and the padding only.
    """
    args = get_args()
    if _are_for_routers(args):
        return _get_batch_for_routers(data_iterator, vp_stage)
    has_documents = args.dataloader_inter_document_masking
    if not has_documents and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    num_padding_B = None
    if has_documents:
        num_padding_B = torch.zeros(args.micro_batch_size, dtype=torch.int64, device="cuda")
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None, "the dataset is built on every stage"
        loaded = next(data_iterator)
        if has_documents:
            _check_documents(loaded["cu_seqlens"], seq_length=args.seq_length)
            num_padding_B = loaded[NUM_PADDING].cuda(non_blocking=True)
        batch = {
            key: loaded[key].cuda(non_blocking=True) if loaded.get(key) is not None else None
            for key in (*BATCH_KEYS, "attention_mask", "cu_seqlens_padded", "local_cp_size")
        }
    batch = _on_this_tp_rank(batch, has_cu_seqlens=has_documents)
    if num_padding_B is not None:
        _broadcast(num_padding_B)
    return flatten_batch_for_packed_sequences(batch) | {NUM_PADDING: num_padding_B}


def _get_batch_for_routers(
    data_iterator: Iterator[Any] | None, vp_stage: int | None
) -> dict[str, Any]:
    args = get_args()
    batch: dict[str, Any] = {}
    sizes = torch.zeros(1, dtype=torch.int64, device="cuda")
    bounds = torch.empty(0)
    num_padding_B = torch.zeros(args.micro_batch_size, dtype=torch.int64, device="cuda")
    is_first = mpu.get_tensor_model_parallel_rank() == 0
    if is_first:
        assert data_iterator is not None, "the dataset is built on every stage"
        loaded = next(data_iterator)
        if ROUTER_BOUNDS not in loaded:
            raise ValueError(
                f"a batch must have {ROUTER_BOUNDS!r} with --pool-documents routers; got {sorted(loaded)}: build the "
                "datasets with emo_megatron.mcore.train.datasets_provider"
            )
        _check_documents(loaded[ROUTER_BOUNDS], seq_length=args.seq_length)
        # on the host, where counting the documents costs nothing
        bounds = merged_bounds(loaded[ROUTER_BOUNDS])
        sizes.fill_(len(bounds))
        bounds = bounds.cuda(non_blocking=True)
        num_padding_B = loaded[NUM_PADDING].cuda(non_blocking=True)
        batch = {key: loaded[key].cuda(non_blocking=True) for key in BATCH_KEYS[:4]}
    if mpu.get_tensor_model_parallel_world_size() > 1:
        _broadcast(sizes)
        if not is_first:
            bounds = torch.empty(int(sizes.item()), dtype=torch.int64, device="cuda")
        _broadcast(bounds)
        _broadcast(num_padding_B)
    documents = {ROUTER_BOUNDS: bounds, NUM_PADDING: num_padding_B}
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS) | documents
    batch = _on_this_tp_rank(batch, has_cu_seqlens=False)
    group = mpu.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group) | documents


def _on_this_tp_rank(batch: dict[str, Any], *, has_cu_seqlens: bool) -> dict[str, Any]:
    """Tensor-parallel rank 0's batch, and of it what this pipeline stage needs."""
    args = get_args()
    on_rank: dict[str, Any] = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=has_cu_seqlens,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return on_rank


def _broadcast(values: Tensor) -> None:
    """Give every tensor-parallel rank what rank 0 has."""
    if mpu.get_tensor_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            values,
            mpu.get_tensor_model_parallel_src_rank(),
            group=mpu.get_tensor_model_parallel_group(),
        )


def router_documents(batch: dict[str, Any]) -> RouterDocuments | None:
    """The micro-batch's document boundaries for the routers only; None in every other mode."""
    if batch.get(ROUTER_BOUNDS) is None:
        return None
    return RouterDocuments(
        cu_seqlens=batch[ROUTER_BOUNDS],
        tokens_per_sample=get_args().seq_length,
        num_padding_B=batch[NUM_PADDING],
    )


def _check_documents(cu_seqlens: Tensor, *, seq_length: int) -> None:
    """Refuse impossible boundaries while they are still on the host, where looking at them costs nothing."""
    for sample in cu_seqlens.reshape(-1, cu_seqlens.shape[-1]):
        DocumentSegments.from_cu_seqlens(sample, num_tokens=seq_length)


def packed_documents(batch: dict[str, Any]) -> PackedSeqParams | None:
    """The micro-batch's document boundaries in the form Megatron's layers take; None without boundaries."""
    if batch.get("cu_seqlens") is None:
        return None
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    longest = int(batch["max_seqlen"].item())
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )
    setattr(packed, TRAILING_PADDING, batch[NUM_PADDING])
    return packed


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed cross entropy of this rank's tokens, their number, and both for the log."""
    args = get_args()
    is_counted = loss_mask.reshape(-1).float()
    loss = torch.sum(output_tensor.reshape(-1).float() * is_counted)
    num_tokens = is_counted.sum().detach().to(torch.int)
    if args.check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    return loss, num_tokens, report


def forward_step(
    data_iterator: Iterator[Any] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """One micro-batch through this stage.

    Args:
        data_iterator: of this stage's batches.
        model: this stage, or virtual stage.
        return_schedule_plan: plan the pass and don't run it, as --overlap-moe-expert-parallel-comm asks.

    Returns:
        The stage's output or the plan, and the loss as a function of the output.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packed = packed_documents(batch)
    timers("batch-generator").stop()
    num_samples = 1 if packed is None else len(batch[NUM_PADDING])
    flatten_received(model, num_samples=num_samples)
    output = forward_with_documents(
        model.build_schedule_plan if return_schedule_plan else model,
        router_documents(batch),
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
    )
    if not return_schedule_plan:
        output = as_exchanged(output, model, num_samples=num_samples)
    return output, functools.partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets, on tensor-parallel rank 0 of every stage that needs tokens or boundaries."""
    args = get_args()

    def is_built_here() -> bool:
        if mpu.get_tensor_model_parallel_rank() != 0:
            return False
        return has_documents(args) or bool(is_first_or_last_pipeline_stage(vp_stage))

    print_rank_0("> building train, validation, and test datasets ...")
    builder = BlendedMegatronDatasetBuilder(
        PoolMockGPTDataset if args.mock_data else PoolGPTDataset,
        num_samples,
        is_built_here,
        dataset_config(args),
    )
    train, valid, test = builder.build()
    return train, valid, test


# megatron.training builds such a provider's datasets on every rank
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def dataset_config(args: Any) -> PoolDatasetConfig:
    """Megatron's dataset configuration from its own flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        sequences_per_dataset = read_object(
            Path(args.per_dataset_sequences_path), kind="sequences of each dataset"
        )
    return PoolDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences_per_dataset,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
        gives_router_bounds=_are_for_routers(args),
    )
