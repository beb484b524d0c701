"""What Megatron's flags of context parallelism and multi-token prediction must be to each other, and to the pools."""

from __future__ import annotations

from typing import Any

from emo_megatron.config import PoolConfig


def are_for_routers(args: Any) -> bool:
    """Whether document boundaries are for the routers only."""
    # a script that uses this package may have no flags of pools
    return getattr(args, "pool_documents", "attention") == "routers"


def is_padded(args: Any) -> bool:
    """Whether documents are padded, because context parallelism cuts them one by one."""
    is_packed = args.dataloader_inter_document_masking
    return bool(is_packed and args.context_parallel_size > 1 and not are_for_routers(args))


def problems_with_long_context(pool: PoolConfig, args: Any) -> list[str]:
    """What does not go together in pretrain_emo.py, one sentence each."""
    is_packed = args.dataloader_inter_document_masking and pool.pool_documents == "attention"
    is_cut = is_packed and args.context_parallel_size > 1
    return [
        *_problems_with_lengths(args, is_cut=is_cut),
        *([] if is_cut else _problems_with_samples(args, is_packed=is_packed)),
        *problems_with_exchange(args, is_cut=is_cut),
        *problems_with_prediction(args, is_packed=is_packed),
    ]


def _problems_with_lengths(args: Any, *, is_cut: bool) -> list[str]:
    """Micro-batches that are as long as their documents need, where every rank's must be of one length."""
    # commands that open a trained model have no such flag
    most = getattr(args, "max_documents", None)
    if most is not None and not is_cut:
        return [
            "--max-documents must not be given without --context-parallel-size above 1 and packed documents; got "
            f"{most}: documents are padded only there"
        ]
    if most is not None:
        return [] if most > 0 else [f"--max-documents must be at least 1; got {most}"]
    if not is_cut or (needs := equal_lengths_flag(args)) is None:
        return []
    return [
        f"--max-documents must be given with {needs} and --context-parallel-size {args.context_parallel_size}: that "
        "takes equally many tokens of every rank, and documents are padded to other lengths on each"
    ]


def _problems_with_samples(args: Any, *, is_packed: bool) -> list[str]:
    """Samples that nobody pads and sequence parallelism can't cut; what padding makes of documents it can."""
    if not args.sequence_parallel:
        return []
    held = args.seq_length // args.context_parallel_size
    if is_packed and args.pipeline_model_parallel_size == 1:
        # one after the other; between stages samples are sent side by side
        held *= args.micro_batch_size
    if held % args.tensor_model_parallel_size == 0:
        return []
    return [
        "--seq-length must give every context-parallel rank a multiple of --tensor-model-parallel-size "
        f"({args.tensor_model_parallel_size}) tokens with --sequence-parallel; got {args.seq_length}, and {held} tokens"
    ]


def equal_lengths_flag(config: Any) -> str | None:
    """The flag for which every rank must have equally many tokens; None if ranks need not."""
    kind = config.moe_token_dispatcher_type
    if kind == "allgather" and config.expert_model_parallel_size > 1:
        return "--moe-token-dispatcher-type allgather"
    is_hybridep = kind == "flex" and config.moe_flex_dispatcher_backend == "hybridep"
    if is_hybridep and not config.moe_hybridep_pad_uneven_dispatch_inputs:
        return "--moe-flex-dispatcher-backend hybridep"
    return None


def problems_with_exchange(args: Any, *, is_cut: bool) -> list[str]:
    """How context-parallel ranks exchange keys and values, where attention does something else.

    Args:
        args: parsed flags, or a model's configuration.
        is_cut: whether documents are cut one by one.
    """
    if args.context_parallel_size == 1:
        return []
    asked = args.cp_comm_type or []
    kinds = {asked} if isinstance(asked, str) else set(asked)
    problems = []
    if args.transformer_impl == "local" and kinds - {"p2p"}:
        problems.append(
            f"--cp-comm-type must not be given with --transformer-impl local; got {sorted(kinds)}: its attention "
            "gathers keys and values, and the exchanges are Transformer Engine's"
        )
    elif is_cut and "a2a+p2p" in kinds:
        problems.append(
            "--cp-comm-type must not be a2a+p2p with packed documents: Transformer Engine has it for whole samples only"
        )
    sizes = args.hierarchical_context_parallel_sizes
    if sizes and "a2a+p2p" not in kinds:
        problems.append(
            f"--hierarchical-context-parallel-sizes must not be given without --cp-comm-type a2a+p2p; got {sizes}: "
            "nothing else reads it"
        )
    return problems


def problems_with_prediction(args: Any, *, is_packed: bool) -> list[str]:
    """What does not go with multi-token prediction.

    Args:
        args: parsed flags, or a model's configuration.
        is_packed: whether attention keeps to documents.
    """
    if not args.mtp_num_layers:
        if getattr(args, "mtp_exact_loss", False):
            return ["--mtp-exact-loss must not be given without --mtp-num-layers: there is no such loss"]
        return []
    problems = []
    if args.overlap_moe_expert_parallel_comm and is_packed:
        problems.append(
            "--mtp-num-layers must not be given with --overlap-moe-expert-parallel-comm and packed documents; got "
            f"{args.mtp_num_layers}: Megatron's plan of a pass asserts that there are none; give --pool-documents "
            "routers"
        )
    has_positions = args.position_embedding_type == "learned_absolute"
    if has_positions and args.pipeline_model_parallel_size > 1:
        problems.append(
            "--position-embedding-type must not be learned_absolute with --mtp-num-layers and "
            "--pipeline-model-parallel-size above 1: Megatron shares the embedding of tokens with the stage of "
            "multi-token prediction, and leaves that of positions apart on each"
        )
    return problems
