"""The method's flags in Megatron's parser, and the check of everything asked for before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Sequence

from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore.compat import repair_help
from emo_megatron.mcore.flags import add_fields
from emo_megatron.mcore.long_context_flags import problems_with_long_context, problems_with_prediction
from emo_megatron.mcore.restart import problems_with_restarts
from emo_megatron.mcore.routing_flags import problems_with_routing
from emo_megatron.mcore.unsupported import SCRIPT_REFUSALS, Refusal, problems_of, problems_with_config


def add_pool_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add one flag for every PoolConfig field, documented by that field (Megatron's extra_args_provider)."""
    repair_help(parser)
    group = parser.add_argument_group(
        "document pools", "EMO: every token of a document chooses its experts inside one pool. Off without --pool-min."
    )
    add_fields(group, PoolConfig, flag=flag)
    group.add_argument(
        "--override-pool-config",
        action="store_true",
        help="Resume a run although the pools it was trained with differ from these.",
    )
    group.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="With context parallelism and packed documents: give every micro-batch the length that N documents need, "
        "those of all its samples together, padding included. Without it, micro-batches are as long as their own "
        "documents need.",
    )
    group.add_argument(
        "--mtp-exact-loss",
        action="store_true",
        help="Divide the losses of multi-token prediction by the tokens of the main loss, so that parallel layouts "
        "change them as little as the main loss. Megatron divides by the counted tokens of each rank's micro-batch.",
    )
    return parser


def pool_config_from_args(args: argparse.Namespace) -> PoolConfig:
    """The PoolConfig the flags describe.

    Raises:
        ValueError: naming every problem of these flags, and groups and balance losses that Megatron asserts to fit.
    """
    pool = PoolConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(PoolConfig)})
    if getattr(args, "context_parallel_size", 1) > 1 and pool.pool_documents == "attention":
        # as batches.py cuts
        pool = dataclasses.replace(pool, pool_cp_partition="document")
    _raise(problems_with_routing(pool, args, only_asserted=True))
    return pool


def check_run(
    pool: PoolConfig,
    config: TransformerConfig,
    args: argparse.Namespace,
    *,
    refusals: Sequence[Refusal] = SCRIPT_REFUSALS,
) -> None:
    """Refuse what this package would do wrong or silently not do, all of it in one error.

    Args:
        pool: the method.
        config: Megatron's configuration of the model.
        args: Megatron's parsed flags.
        refusals: rows on the flags; by default those of `pretrain_emo.py`.

    Raises:
        ValueError: one line a problem: what must hold, what came, why.
    """
    problems = problems_with_config(pool, config) + problems_of(refusals, args, pool)
    # a row on the model and one on the flags may say the same
    problems = list(dict.fromkeys(problems))
    if refusals is SCRIPT_REFUSALS:
        problems += _problems_with_conversations(args) + problems_with_restarts(args)
        problems += problems_with_long_context(pool, args)
    else:
        problems += problems_with_prediction(args, is_packed=args.dataloader_inter_document_masking)
    problems += _problems_with_boundaries(pool, args) + _problems_with_sharded_optimizer(args)
    problems += _problems_with_delay(pool, args)
    if pool.is_on and args.dataloader_type != "single":
        warnings.warn(
            f"--dataloader-type {args.dataloader_type}: pool sizes will depend on the number of "
            "data-parallel ranks; with --dataloader-type single they do not",
            stacklevel=2,
        )
    _raise(problems)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def _problems_with_boundaries(pool: PoolConfig, args: argparse.Namespace) -> list[str]:
    """Boundaries that are missing, given twice, or in batches that cannot go where they must, one sentence each."""
    is_packed = args.dataloader_inter_document_masking or args.sft
    packing = "--sft" if args.sft else "--dataloader-inter-document-masking"
    is_for_routers = pool.pool_documents == "routers"
    problems = []
    if is_packed and is_for_routers:
        problems.append(
            f"{packing} must not be given with --pool-documents routers: attention would keep to documents too"
        )
    if (
        is_packed
        and args.micro_batch_size > 1
        and args.virtual_pipeline_model_parallel_size is not None
        and args.overlap_moe_expert_parallel_comm
    ):
        problems.append(
            "--micro-batch-size must be 1 in an interleaved pipeline with --overlap-moe-expert-parallel-comm and "
            f"{packing}; got {args.micro_batch_size}: Megatron's plan of a pass can't send packed samples"
        )
    if args.tensor_model_parallel_size > 1 and args.eval_micro_batch_size not in (None, args.micro_batch_size):
        problems.append(
            f"--eval-micro-batch-size must be --micro-batch-size ({args.micro_batch_size}) with "
            f"--tensor-model-parallel-size above 1; got {args.eval_micro_batch_size}: all ranks but the first expect "
            "batches of the training's size"
        )
    if pool.pool_balance == "running" and not (is_packed or is_for_routers):
        problems.append(
            "--dataloader-inter-document-masking or --pool-documents routers must be given with --pool-balance "
            "running: the step so far is kept with the documents"
        )
    if pool.is_on and not (is_packed or is_for_routers):
        problems.append(
            "--dataloader-inter-document-masking must be given with --pool-min: pools follow document boundaries; "
            "or --pool-documents routers, with which attention does not"
        )
    return problems


def _problems_with_delay(pool: PoolConfig, args: argparse.Namespace) -> list[str]:
    """A delay that leaves no step with pools, in a sentence; nothing where the run's length is not told."""
    if pool.pool_delay_samples == 0 or args.skip_train:
        return []
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    if not 0 < samples <= pool.pool_delay_samples:
        return []
    return [
        f"--pool-delay-samples must be below the samples of the run ({samples}), or no step has pools; got "
        f"{pool.pool_delay_samples}"
    ]


def _problems_with_sharded_optimizer(args: argparse.Namespace) -> list[str]:
    """Checkpoints for which Megatron-FSDP would wait for ever, one sentence each.

    Its ranks gather one state of the optimizer after the other, and torch's AdamW, without Transformer Engine and Apex
    Megatron's, keeps none for a weight of which the rank holds nothing.
    """
    is_sharded = args.data_parallel_size > 1 and args.data_parallel_sharding_strategy != "no_shard"
    if not (args.use_megatron_fsdp and is_sharded and USING_PYTORCH_OPTIMIZER):
        return []
    ranks = f"{args.data_parallel_size} data-parallel ranks"
    where = f"with --use-megatron-fsdp on {ranks} without Transformer Engine or Apex"
    problems = []
    if args.save and not args.no_save_optim:
        problems.append(
            f"--no-save-optim must be given with --save {args.save} {where}: torch's AdamW keeps no state for weights "
            "on other ranks, and the save would never end"
        )
    if args.load and not (args.no_load_optim or args.finetune):
        problems.append(
            f"--load {args.load} must not be given {where}: torch's AdamW keeps no state for weights on other ranks, "
            "and the load would never end; convert the checkpoint with python -m emo_megatron.mcore.fsdp"
        )
    return problems


def _problems_with_conversations(args: argparse.Namespace) -> list[str]:
    """What --sft cannot go with, one sentence each; much of it Megatron's dataset would fail on at the first sample."""
    if not args.sft:
        return []
    wanted = (
        ("context_parallel_size", 1, "context parallelism pads between conversations, and routers are not told where"),
        ("tokenizer_type", "SFTTokenizer", "it reads conversations"),
        ("mock_data", False, "there are no made-up conversations"),
        ("reset_position_ids", False, "positions restart with every conversation as it is"),
    )
    return [
        f"{flag(name)} must be {value!r} with --sft; got {getattr(args, name)!r}: {reason}"
        for name, value, reason in wanted
        if getattr(args, name) != value
    ]
