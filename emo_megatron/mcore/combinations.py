"""What Megatron's flags must be to each other, and to the pools: a sentence for every combination that cannot be."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.transformer.moe import moe_layer

from emo_megatron.config import PoolConfig, broken, flag
from emo_megatron.mcore.unsupported import DEDUP, MODEL, problems_of

GATES = ("sigmoid", "sqrtsoftplus")
RESTARTS = "nvidia_resiliency_ext"
"""The package behind --inprocess-restart."""


def are_for_routers(args: Any) -> bool:
    """Whether document boundaries are for the routers only."""
    # a script that uses this package may have no flags of pools
    return getattr(args, "pool_documents", "attention") == "routers"


def is_padded(args: Any) -> bool:
    """Whether documents are padded, because context parallelism cuts them one by one."""
    return bool(args.dataloader_inter_document_masking and args.context_parallel_size > 1 and not are_for_routers(args))


def problems_with_config(pool: PoolConfig, config: Any) -> list[str]:
    """What a model of this TransformerConfig cannot do with the pool layers."""
    if not config.num_moe_experts:
        return ["--num-experts must be given: the pool layers are mixture-of-experts layers"]
    rows = MODEL + (DEDUP if pool.pool_dispatcher == "dedup" else ())
    return [
        *pool.problems_with_model(num_experts=config.num_moe_experts, top_k=config.moe_router_topk),
        *problems_with_routing(pool, config),
        *problems_of(rows, config, has_pools=pool.is_on),
    ]


def problems_with_routing(pool: PoolConfig, values: Any, *, only_asserted: bool = False) -> list[str]:
    """What does not go together in the router, by Megatron's TransformerConfig or its parsed flags.

    With `only_asserted` only what Megatron stops at by an assertion when it makes the one of the other.
    """
    num_experts = getattr(values, "num_moe_experts", None) or getattr(values, "num_experts", None)
    # flags that another host's parser does not have are passed over
    if not num_experts or not hasattr(values, "moe_router_load_balancing_type"):
        return []
    problems = _problems_with_balance(pool, values) + _problems_with_groups(pool, values, num_experts)
    if only_asserted:
        return problems
    score, has_bias = values.moe_router_score_function, values.moe_router_enable_expert_bias
    gates = " or ".join(GATES)
    return problems + broken(
        (
            has_bias and score not in GATES,
            f"--moe-router-score-function must be {gates} with --moe-router-enable-expert-bias; got {score}",
        ),
        (
            pool.pool_score == "gate_with_bias" and not (has_bias and score in GATES),
            f"--moe-router-enable-expert-bias and --moe-router-score-function {gates} must be given with --pool-score "
            f"gate_with_bias; got {score} {'with' if has_bias else 'without'} a bias",
        ),
        (
            # Megatron would stop at an assertion while it builds the layers
            values.moe_latent_size and not moe_layer.HAVE_TE,
            f"--moe-latent-size {values.moe_latent_size} needs Transformer Engine, which has the projections to and "
            "from the latent size and is not installed",
        ),
    )


def _problems_with_balance(pool: PoolConfig, values: Any) -> list[str]:
    found, coefficients = values.moe_router_load_balancing_type, values.moe_aux_loss_coeff
    kinds = list(found) if (is_list := isinstance(found, list | tuple)) else [found]
    num_coefficients = len(coefficients) if isinstance(coefficients, list | tuple) else None
    named = " ".join(kinds)
    return broken(
        (
            num_coefficients != (len(kinds) if is_list else None),
            f"--moe-aux-loss-coeff must be one number for each of --moe-router-load-balancing-type {named}; got "
            f"{coefficients!r}",
        ),
        (len(set(kinds)) < len(kinds), f"--moe-router-load-balancing-type must name a loss once; got {named}"),
        (
            pool.pool_balance == "running" and {"aux_loss", "seq_aux_loss"}.issuperset(kinds),
            "--pool-balance must be micro without global_aux_loss, whose fraction it is about; got 'running' with "
            f"--moe-router-load-balancing-type {named}",
        ),
    )


def _problems_with_groups(pool: PoolConfig, values: Any, num_experts: int) -> list[str]:
    groups, limit, top_k = values.moe_router_num_groups, values.moe_router_group_topk, values.moe_router_topk
    of_documents = pool.pool_group_scope == "document"
    problems = broken(
        (
            of_documents and not (groups and limit and limit < groups),
            "--moe-router-num-groups, and a smaller --moe-router-group-topk, must be given with --pool-group-scope "
            f"document; got {groups} and {limit}",
        ),
        (
            pool.is_on and bool(limit) != bool(groups) and groups != 1,
            "--moe-router-num-groups and --moe-router-group-topk go together, alone they limit nothing; got "
            f"{groups} and {limit}",
        ),
    )
    if not (groups and limit):
        return problems
    if num_experts % groups != 0:
        return [*problems, f"--moe-router-num-groups must divide --num-experts ({num_experts}); got {groups}"]
    held = num_experts // groups * limit
    if not 1 <= limit <= groups or limit > top_k:
        most = f"--moe-router-num-groups ({groups}) and --moe-router-topk ({top_k})"
        return [*problems, f"--moe-router-group-topk must be at most {most}; got {limit}"]
    sizes = {name: getattr(pool, name) for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval")}
    return problems + broken(
        (
            held < top_k,
            f"--moe-router-group-topk must be larger: {limit} groups of {num_experts // groups} experts hold fewer "
            f"than --moe-router-topk ({top_k})",
        ),
        *(
            (
                of_documents and size is not None and size > held,
                f"{flag(name)} must be at most {held} with --pool-group-scope document: {limit} of {groups} groups "
                f"hold no more experts; got {size}",
            )
            for name, size in sizes.items()
        ),
    )


def problems_with_long_context(pool: PoolConfig, args: Any) -> list[str]:
    """What does not go together in pretrain_emo.py's context parallelism and multi-token prediction."""
    is_packed = args.dataloader_inter_document_masking and pool.pool_documents == "attention"
    is_cut = is_packed and args.context_parallel_size > 1
    return [
        *_problems_with_lengths(args, is_packed=is_packed, is_cut=is_cut),
        *problems_with_exchange(args, is_cut=is_cut),
        *problems_with_prediction(args, is_packed=is_packed),
    ]


def _problems_with_lengths(args: Any, *, is_packed: bool, is_cut: bool) -> list[str]:
    # commands that open a trained model have no such flag
    most = getattr(args, "max_documents", None)
    needs = equal_lengths_flag(args)
    held = args.seq_length // args.context_parallel_size
    if is_packed and args.pipeline_model_parallel_size == 1:
        # one sample after the other; between stages samples are sent side by side
        held *= args.micro_batch_size
    return broken(
        (
            most is not None and not is_cut,
            "--max-documents must not be given without --context-parallel-size above 1 and packed documents; got "
            f"{most}: documents are padded only there",
        ),
        (is_cut and most is not None and most < 1, f"--max-documents must be at least 1; got {most}"),
        (
            is_cut and most is None and needs,
            f"--max-documents must be given with {needs} and --context-parallel-size {args.context_parallel_size}: "
            "that takes equally many tokens of every rank, and documents are padded to other lengths on each",
        ),
        (
            # nobody pads samples; padding makes of documents what sequence parallelism can cut
            not is_cut and args.sequence_parallel and held % args.tensor_model_parallel_size,
            "--seq-length must give every context-parallel rank a multiple of --tensor-model-parallel-size "
            f"({args.tensor_model_parallel_size}) tokens with --sequence-parallel; got {args.seq_length}, and {held} "
            "tokens",
        ),
    )


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

    By parsed flags, or a model's configuration; `is_cut` says whether documents are cut one by one.
    """
    if args.context_parallel_size == 1:
        return []
    asked = args.cp_comm_type or []
    kinds = {asked} if isinstance(asked, str) else set(asked)
    is_local, is_both = args.transformer_impl == "local", "a2a+p2p" in kinds
    sizes = args.hierarchical_context_parallel_sizes
    return broken(
        (
            is_local and kinds - {"p2p"},
            f"--cp-comm-type must not be given with --transformer-impl local; got {sorted(kinds)}: its attention "
            "gathers keys and values, and the exchanges are Transformer Engine's",
        ),
        (
            is_cut and is_both and not is_local,
            "--cp-comm-type must not be a2a+p2p with packed documents: Transformer Engine has it for whole samples",
        ),
        (
            sizes and not is_both,
            "--hierarchical-context-parallel-sizes must not be given without --cp-comm-type a2a+p2p; got "
            f"{sizes}: nothing else reads it",
        ),
    )


def problems_with_prediction(args: Any, *, is_packed: bool) -> list[str]:
    """What does not go with multi-token prediction, by parsed flags or a model's configuration.

    `is_packed` says whether attention keeps to documents.
    """
    if not args.mtp_num_layers:
        is_exact = getattr(args, "mtp_exact_loss", False)
        return broken((is_exact, "--mtp-exact-loss must not be given without --mtp-num-layers: there is no such loss"))
    has_positions = args.position_embedding_type == "learned_absolute"
    return broken(
        (
            args.overlap_moe_expert_parallel_comm and is_packed,
            "--mtp-num-layers must not be given with --overlap-moe-expert-parallel-comm and packed documents; got "
            f"{args.mtp_num_layers}: Megatron's plan of a pass asserts that there are none; give --pool-documents "
            "routers",
        ),
        (
            has_positions and args.pipeline_model_parallel_size > 1,
            "--position-embedding-type must not be learned_absolute with --mtp-num-layers and "
            "--pipeline-model-parallel-size above 1: Megatron shares the embedding of tokens with the stage of "
            "multi-token prediction, and leaves that of positions apart on each",
        ),
    )


def problems_with_boundaries(pool: PoolConfig, args: Any) -> list[str]:
    """Boundaries that are missing, given twice, or in batches that cannot go where they must."""
    is_packed = args.dataloader_inter_document_masking or args.sft
    packing = "--sft" if args.sft else "--dataloader-inter-document-masking"
    is_for_routers = pool.pool_documents == "routers"
    has_boundaries = is_packed or is_for_routers
    return broken(
        (
            is_packed and is_for_routers,
            f"{packing} must not be given with --pool-documents routers: attention would keep to documents too",
        ),
        (
            is_packed
            and args.micro_batch_size > 1
            and args.virtual_pipeline_model_parallel_size is not None
            and args.overlap_moe_expert_parallel_comm,
            "--micro-batch-size must be 1 in an interleaved pipeline with --overlap-moe-expert-parallel-comm and "
            f"{packing}; got {args.micro_batch_size}: Megatron's plan of a pass can't send packed samples",
        ),
        (
            args.tensor_model_parallel_size > 1 and args.eval_micro_batch_size not in (None, args.micro_batch_size),
            f"--eval-micro-batch-size must be --micro-batch-size ({args.micro_batch_size}) with "
            f"--tensor-model-parallel-size above 1; got {args.eval_micro_batch_size}: all ranks but the first expect "
            "batches of the training's size",
        ),
        (
            pool.pool_balance == "running" and not has_boundaries,
            "--dataloader-inter-document-masking or --pool-documents routers must be given with --pool-balance "
            "running: the step so far is kept with the documents",
        ),
        (
            pool.is_on and not has_boundaries,
            "--dataloader-inter-document-masking must be given with --pool-min: pools follow document boundaries; "
            "or --pool-documents routers, with which attention does not",
        ),
    )


def problems_with_delay(pool: PoolConfig, args: Any) -> list[str]:
    """A delay that leaves no step with pools; nothing where the run's length is not told."""
    delay = pool.pool_delay_samples
    if delay == 0 or args.skip_train:
        return []
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    told = f"--pool-delay-samples must be below the samples of the run ({samples}), or no step has pools; got {delay}"
    return broken((0 < samples <= delay, told))


def problems_with_sharded_optimizer(args: Any) -> list[str]:
    """Checkpoints for which Megatron-FSDP would wait for ever.

    Its ranks gather one state of the optimizer after the other, and torch's AdamW, without Transformer Engine and Apex
    Megatron's, keeps none for a weight of which the rank holds nothing.
    """
    is_sharded = args.data_parallel_size > 1 and args.data_parallel_sharding_strategy != "no_shard"
    if not (args.use_megatron_fsdp and is_sharded and USING_PYTORCH_OPTIMIZER):
        return []
    where = f"with --use-megatron-fsdp on {args.data_parallel_size} ranks without Transformer Engine or Apex"
    why = "torch's AdamW keeps no state for weights on other ranks, and it would never end"
    return broken(
        (args.save and not args.no_save_optim, f"--no-save-optim must be given with --save {args.save} {where}: {why}"),
        (
            args.load and not (args.no_load_optim or args.finetune),
            f"--load {args.load} must not be given {where}: {why}; convert the checkpoint with "
            "python -m emo_megatron.checkpoint.fsdp",
        ),
    )


def problems_with_restarts(args: Any) -> list[str]:
    """Why --inprocess-restart cannot work here: without the package behind it Megatron would go on without restarts."""
    if not args.inprocess_restart:
        return []
    active = args.inprocess_active_world_size
    return broken(
        (
            importlib.util.find_spec(RESTARTS) is None,
            f"--inprocess-restart needs the package {RESTARTS}, which is not installed: "
            "pip install nvidia-resiliency-ext, or drop the flag",
        ),
        (
            active not in (None, args.world_size),
            f"--inprocess-active-world-size must be the number of processes, {args.world_size}; got {active}: flags "
            "are parsed before reserve ranks are set aside",
        ),
    )
