"""Pretraining on megatron.training: the step, the loss and the datasets.

These are the functions that `megatron.training.pretrain` requires, for plain pretraining. Unlike in pretrain_gpt.py,
every pipeline stage builds the dataset, so that routers of middle stages get document boundaries too. Features of
pretrain_gpt.py that are missing here are listed in mcore/unsupported.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from emo_megatron.json_files import read_object
from emo_megatron.mcore.batches import (
    NUM_PADDING,
    PADDED_TOKENS,
    PoolDatasetConfig,
    PoolGPTDataset,
    PoolMockGPTDataset,
    PoolSFTDataset,
    get_batch,
    has_documents,
    needs_tokens,
    packed_documents,
    router_documents,
)
from emo_megatron.mcore.combinations import are_for_routers, is_padded
from emo_megatron.mcore.mtp import use_packed_roll
from emo_megatron.mcore.mtp_loss import use_exact_mtp_loss
from emo_megatron.mcore.padding import over_all_tokens
from emo_megatron.mcore.router_documents import forward_stage

SPIKY_LOSS_FACTOR = 10
"""--check-for-spiky-loss reports a loss that is this many times the largest loss so far."""
# a singleton; constructed here once, because every construction resets Megatron's configuration of it
_STRAGGLERS = StragglerDetector()


def pack_conversations(args: Any) -> None:
    """Set --dataloader-inter-document-masking for --sft runs, whose samples are packed documents."""
    args.dataloader_inter_document_masking |= args.sft


def loss_func(
    loss_mask: Tensor, output_tensor: Tensor, *, padding: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed loss of a micro-batch and its token count, by which Megatron divides the loss.

    Args:
        loss_mask: [1 or mbs, s] of this rank's tokens.
        output_tensor: cross entropies of this rank's tokens.
        padding: [2], number of this rank's tokens that are padding between documents, and number of all its tokens;
            None: no report.

    Returns:
        The summed cross entropy and the number of this rank's tokens. Where Megatron averages the means of
        context-parallel ranks, both are changed so that the average is the mean over all tokens (over_all_tokens).
        And a report of sums and counts for the log.
    """
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
    if padding is not None and torch.is_grad_enabled():
        report["padding share"] = padding
    if args.calculate_per_token_loss or args.context_parallel_size == 1:
        return loss, num_tokens, report
    return *over_all_tokens(loss, num_tokens, mpu.get_context_parallel_group()), report


def forward_step(
    data_iterator: Iterator[Any] | None, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run one micro-batch through this (virtual) stage: returns the output, and a function from output to loss.

    With `return_schedule_plan`, which --overlap-moe-expert-parallel-comm requires, the pass is planned but not run.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _STRAGGLERS(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, get_model_config(model), vp_stage)
    packed = packed_documents(batch)
    timers("batch-generator").stop()
    # samples of padded documents have different lengths; stages send these micro-batches in the packed shape
    is_flat = packed is None or PADDED_TOKENS in batch
    num_samples = 1 if is_flat else len(batch[NUM_PADDING])
    documents = router_documents(batch)
    with _STRAGGLERS:
        output = forward_stage(
            model, batch, documents, packed, num_samples=num_samples, is_planned=return_schedule_plan
        )
    padding = _padding(batch)
    return output, functools.partial(loss_func, batch["loss_mask"], padding=padding)


def _padding(batch: dict[str, Any]) -> Tensor | None:
    """[2]: number of padding tokens between documents, and of all tokens; None: no padding, or a stage without loss."""
    if PADDED_TOKENS not in batch or batch["loss_mask"] is None:
        return None
    mask = batch["loss_mask"]
    num_tokens, num_packed = batch[PADDED_TOKENS], len(batch[NUM_PADDING]) * get_args().seq_length
    # every context-parallel rank counts its share; filled on the device, without synchronisation
    shares = (num_tokens - num_packed, num_tokens)
    return torch.stack([mask.new_full((), float(share)) for share in shares])


def prepare_prediction(args: Any) -> None:
    """Replace Megatron's roll of packed documents, and with --mtp-exact-loss its multi-token prediction loss."""
    if args.mtp_num_layers:
        use_packed_roll()
    if args.mtp_exact_loss:
        use_exact_mtp_loss()


def embedding_ranks(config: TransformerConfig, *, is_tied: bool) -> Callable[..., list[int]]:
    """For Megatron's `pretrain`: a function that returns the ranks of a pipeline that share the token embedding.

    By default Megatron takes the first and the last rank. A stage between them with layers of multi-token prediction
    would then train a separate embedding table, starting from zeros.

    Args:
        config: the model's configuration.
        is_tied: whether the output layer shares the weights of the embedding.
    """

    def ranks_of(pipeline: list[int], *unused: Any) -> list[int]:
        last = pipeline[-1:] if is_tied else []
        return sorted({pipeline[0], *last, *get_mtp_ranks(pipeline, config)})

    return ranks_of


def let_lengths_vary(args: Any, config: TransformerConfig) -> None:
    """Make pipeline stages send shapes if micro-batches are padded, because their lengths then depend on documents."""
    config.variable_seq_lengths |= is_padded(args) and args.pipeline_model_parallel_size > 1


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Train, validation and test datasets, on tensor-parallel rank 0 of every stage that needs tokens or boundaries."""
    args = get_args()
    config = core_transformer_config_from_args(args)

    def is_built_here() -> bool:
        if mpu.get_tensor_model_parallel_rank() != 0:
            return False
        return has_documents(args) or needs_tokens(config, vp_stage)

    print_rank_0("> building train, validation, and test datasets ...")
    dataset = PoolMockGPTDataset if args.mock_data else PoolGPTDataset
    builder = BlendedMegatronDatasetBuilder(
        PoolSFTDataset if args.sft else dataset, num_samples, is_built_here, dataset_config(args)
    )
    train, valid, test = builder.build()
    return train, valid, test


# with this attribute megatron.training builds the datasets on every rank
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def dataset_config(args: Any) -> PoolDatasetConfig:
    """The dataset configuration from Megatron's flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        sequences_per_dataset = read_object(Path(args.per_dataset_sequences_path), kind="sequences of each dataset")
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
        gives_router_bounds=are_for_routers(args),
    )
