"""Combinations of Megatron's flags and --pool-* flags that are not supported; one sentence per combination."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER
from megatron.core.transformer.moe import moe_layer

from emo_megatron.config import PoolConfig, broken, flag
from emo_megatron.mcore.unsupported import DEDUP, MODEL, problems_of

GATES = ("sigmoid", "sqrtsoftplus")
RESTARTS = "nvidia_resiliency_ext"
"""The package that --inprocess-restart needs."""


def are_for_routers(args: Any) -> bool:
    """Whether only the routers get document boundaries."""
    # scripts that use this package may lack the --pool-* flags
    return getattr(args, "pool_documents", "attention") == "routers"


def is_padded(args: Any) -> bool:
    """Whether documents are padded because context parallelism cuts each document."""
    return bool(args.dataloader_inter_document_masking and args.context_parallel_size > 1 and not are_for_routers(args))


def problems_with_config(pool: PoolConfig, config: Any) -> list[str]:
    """Problems of a model with this TransformerConfig and pool layers; one sentence per problem."""
    if not config.num_moe_experts:
        return ["--num-experts must be given: the pool layers are mixture-of-experts layers"]
    rows = MODEL + (DEDUP if pool.pool_dispatcher == "dedup" else ())
    return [
        *pool.problems_with_model(num_experts=config.num_moe_experts, top_k=config.moe_router_topk),
        *problems_with_routing(pool, config),
        *problems_of(rows, config, has_pools=pool.is_on),
    ]


def problems_with_routing(pool: PoolConfig, values: Any, *, only_asserted: bool = False) -> list[str]:
    """Problems of the router's options, from Megatron's TransformerConfig or from Megatron's parsed flags.

    With `only_asserted`: only problems that raise an assertion while Megatron makes the config from the flags.
    """
    num_experts = getattr(values, "num_moe_experts", None) or getattr(values, "num_experts", None)
    # the parser of another host may lack these flags
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
            "--pool-score gate_with_bias requires --moe-router-enable-expert-bias and --moe-router-score-function "
            f"{gates}; got score function {score} {'with' if has_bias else 'without'} an expert bias",
        ),
        (
            # Megatron would stop at an assertion while building the layers
            values.moe_latent_size and not moe_layer.HAVE_TE,
            f"--moe-latent-size {values.moe_latent_size} needs Transformer Engine, which is not installed: only "
            "Transformer Engine has the projections to and from the latent size; drop the flag or install the package",
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
            f"--moe-aux-loss-coeff must have one number per loss of --moe-router-load-balancing-type {named}; got "
            f"{coefficients!r}",
        ),
        (len(set(kinds)) < len(kinds), f"--moe-router-load-balancing-type must name each loss only once; got {named}"),
        (
            pool.pool_balance == "running" and {"aux_loss", "seq_aux_loss"}.issuperset(kinds),
            "--pool-balance running requires global_aux_loss, the only loss that --pool-balance changes; got "
            f"--moe-router-load-balancing-type {named}",
        ),
    )


def _problems_with_groups(pool: PoolConfig, values: Any, num_experts: int) -> list[str]:
    groups, limit, top_k = values.moe_router_num_groups, values.moe_router_group_topk, values.moe_router_topk
    of_documents = pool.pool_group_scope == "document"
    problems = broken(
        (
            of_documents and not (groups and limit and limit < groups),
            "--pool-group-scope document requires --moe-router-num-groups and a smaller --moe-router-group-topk; got "
            f"{groups} and {limit}",
        ),
        (
            pool.is_on and bool(limit) != bool(groups) and groups != 1,
            "--moe-router-num-groups and --moe-router-group-topk must be given together, because one of them alone has "
            f"no effect; got {groups} and {limit}",
        ),
    )
    if not (groups and limit):
        return problems
    if num_experts % groups != 0:
        return [*problems, f"--moe-router-num-groups must divide --num-experts ({num_experts}); got {groups}"]
    held = num_experts // groups * limit
    if not 1 <= limit <= groups or limit > top_k:
        most = f"--moe-router-num-groups ({groups}) and --moe-router-topk ({top_k})"
        return [*problems, f"--moe-router-group-topk must be at least 1 and at most {most}; got {limit}"]
    sizes = {name: getattr(pool, name) for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval")}
    return problems + broken(
        (
            held < top_k,
            f"--moe-router-group-topk must admit groups that hold --moe-router-topk ({top_k}) experts or more; got "
            f"{limit} groups of {num_experts // groups} experts",
        ),
        *(
            (
                of_documents and size is not None and size > held,
                f"{flag(name)} must be at most {held}, the number of experts in {limit} of {groups} groups, with "
                f"--pool-group-scope document; got {size}",
            )
            for name, size in sizes.items()
        ),
    )


def problems_with_long_context(pool: PoolConfig, args: Any) -> list[str]:
    """Problems of context parallelism and multi-token prediction in pretrain_emo.py; one sentence per problem."""
    is_packed = args.dataloader_inter_document_masking and pool.pool_documents == "attention"
    is_cut = is_packed and args.context_parallel_size > 1
    return [
        *_problems_with_lengths(args, is_packed=is_packed, is_cut=is_cut),
        *problems_with_exchange(args, is_cut=is_cut),
        *problems_with_prediction(args, is_packed=is_packed),
    ]


def _problems_with_lengths(args: Any, *, is_packed: bool, is_cut: bool) -> list[str]:
    # the commands that open a trained model lack this flag
    most = getattr(args, "max_documents", None)
    needs = equal_lengths_flag(args)
    held = args.seq_length // args.context_parallel_size
    if is_packed and args.pipeline_model_parallel_size == 1:
        # one sequence of all samples; pipeline stages exchange a batch of samples instead
        held *= args.micro_batch_size
    return broken(
        (
            most is not None and not is_cut,
            "--max-documents must not be given without --context-parallel-size above 1 and packed documents "
            f"(--dataloader-inter-document-masking); got {most}: other runs do not pad documents",
        ),
        (is_cut and most is not None and most < 1, f"--max-documents must be at least 1; got {most}"),
        (
            is_cut and most is None and needs,
            f"--max-documents must be given with {needs} and --context-parallel-size {args.context_parallel_size}: the "
            "dispatcher requires equal numbers of tokens on all ranks, and padding makes the numbers differ; give the "
            "largest number of documents per micro-batch",
        ),
        (
            # whole samples are not padded; padded documents always have a length that sequence parallelism can cut
            not is_cut and args.sequence_parallel and held % args.tensor_model_parallel_size,
            "--seq-length must give every context-parallel rank a multiple of --tensor-model-parallel-size "
            f"({args.tensor_model_parallel_size}) tokens with --sequence-parallel; got {args.seq_length}, which gives "
            f"{held} tokens per rank",
        ),
    )


def equal_lengths_flag(config: Any) -> str | None:
    """The flag that requires equal numbers of tokens on all ranks; None if no flag requires this."""
    kind = config.moe_token_dispatcher_type
    if kind == "allgather" and config.expert_model_parallel_size > 1:
        return "--moe-token-dispatcher-type allgather"
    is_hybridep = kind == "flex" and config.moe_flex_dispatcher_backend == "hybridep"
    if is_hybridep and not config.moe_hybridep_pad_uneven_dispatch_inputs:
        return "--moe-flex-dispatcher-backend hybridep"
    return None


def problems_with_exchange(args: Any, *, is_cut: bool) -> list[str]:
    """Problems of the exchange of keys and values between context-parallel ranks; one sentence per problem.

    Args:
        args: parsed flags, or a model's configuration.
        is_cut: whether context parallelism cuts each document, instead of each sample.
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
            f"--cp-comm-type must be p2p or not given with --transformer-impl local; got {sorted(kinds)}: the other "
            "exchanges are implemented by Transformer Engine only",
        ),
        (
            is_cut and is_both and not is_local,
            "--cp-comm-type must not be a2a+p2p with packed documents: Transformer Engine implements a2a+p2p for whole "
            "samples only; use another exchange, or --pool-documents routers",
        ),
        (
            sizes and not is_both,
            "--hierarchical-context-parallel-sizes must not be given without --cp-comm-type a2a+p2p; got "
            f"{sizes}: no other exchange uses these sizes",
        ),
    )


def problems_with_prediction(args: Any, *, is_packed: bool) -> list[str]:
    """Problems of multi-token prediction; one sentence per problem.

    Args:
        args: parsed flags, or a model's configuration.
        is_packed: whether attention stays inside documents.
    """
    if not args.mtp_num_layers:
        is_exact = getattr(args, "mtp_exact_loss", False)
        return broken(
            (is_exact, "--mtp-exact-loss must not be given without --mtp-num-layers: there is no loss to change")
        )
    has_positions = args.position_embedding_type == "learned_absolute"
    return broken(
        (
            args.overlap_moe_expert_parallel_comm and is_packed,
            "--mtp-num-layers must not be given with --overlap-moe-expert-parallel-comm and packed documents; got "
            f"{args.mtp_num_layers}: Megatron's schedule plan asserts that samples are not packed; use "
            "--pool-documents routers",
        ),
        (
            has_positions and args.pipeline_model_parallel_size > 1,
            "--position-embedding-type must not be learned_absolute with --mtp-num-layers and "
            "--pipeline-model-parallel-size above 1: Megatron shares only the token embedding between stages, so the "
            "stage of multi-token prediction would train its own position embedding; use another position embedding",
        ),
    )


def problems_with_boundaries(pool: PoolConfig, args: Any) -> list[str]:
    """Problems of document boundaries: missing, given twice, or in batches that cannot be sent to other ranks."""
    is_packed = args.dataloader_inter_document_masking or args.sft
    packing = "--sft" if args.sft else "--dataloader-inter-document-masking"
    is_for_routers = pool.pool_documents == "routers"
    has_boundaries = is_packed or is_for_routers
    return broken(
        (
            is_packed and is_for_routers,
            f"{packing} must not be given with --pool-documents routers: attention would stay inside documents too; "
            "drop one of the two flags",
        ),
        (
            is_packed
            and args.micro_batch_size > 1
            and args.virtual_pipeline_model_parallel_size is not None
            and args.overlap_moe_expert_parallel_comm,
            "--micro-batch-size must be 1 in an interleaved pipeline with --overlap-moe-expert-parallel-comm and "
            f"{packing}; got {args.micro_batch_size}: Megatron's schedule plan cannot send several packed "
            "samples from stage to stage",
        ),
        (
            args.tensor_model_parallel_size > 1 and args.eval_micro_batch_size not in (None, args.micro_batch_size),
            f"--eval-micro-batch-size must equal --micro-batch-size ({args.micro_batch_size}) with "
            f"--tensor-model-parallel-size above 1; got {args.eval_micro_batch_size}: all tensor-parallel ranks except "
            "the first expect batches of the training size",
        ),
        (
            pool.pool_balance == "running" and not has_boundaries,
            "--pool-balance running requires document boundaries, because the counts of the step so far are stored "
            "with the documents; give --dataloader-inter-document-masking or --pool-documents routers",
        ),
        (
            pool.is_on and not has_boundaries,
            "--pool-min requires document boundaries; give --dataloader-inter-document-masking (attention stays inside "
            "documents, as in the paper) or --pool-documents routers (attention runs across documents)",
        ),
    )


def problems_with_delay(pool: PoolConfig, args: Any) -> list[str]:
    """The problem of a delay that leaves no step with pools; none if the length of the run is not given."""
    delay = pool.pool_delay_samples
    if delay == 0 or args.skip_train:
        return []
    samples = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    told = f"--pool-delay-samples must be less than the run's samples ({samples}), or no step has pools; got {delay}"
    return broken((0 < samples <= delay, told))


def problems_with_sharded_optimizer(args: Any) -> list[str]:
    """Problems of checkpoints whose optimizer Megatron-FSDP would never finish saving or loading.

    The ranks gather the optimizer's states one after the other. Without Transformer Engine and Apex, Megatron uses
    torch's AdamW. AdamW keeps no state for a weight of which the rank holds nothing, so ranks gather different states.
    """
    is_sharded = args.data_parallel_size > 1 and args.data_parallel_sharding_strategy != "no_shard"
    if not (args.use_megatron_fsdp and is_sharded and USING_PYTORCH_OPTIMIZER):
        return []
    where = f"with --use-megatron-fsdp on {args.data_parallel_size} ranks without Transformer Engine or Apex"
    why = "torch's AdamW keeps no state for weights on other ranks, so saving or loading the optimizer never ends"
    return broken(
        (args.save and not args.no_save_optim, f"--no-save-optim must be given with --save {args.save} {where}: {why}"),
        (
            args.load and not (args.no_load_optim or args.finetune),
            f"--no-load-optim or --finetune must be given with --load {args.load} {where}: {why}; "
            "python -m emo_megatron.checkpoint.fsdp converts the weights to torch_dist",
        ),
    )


def problems_with_restarts(args: Any) -> list[str]:
    """Problems of --inprocess-restart. Without the package Megatron runs, but never restarts."""
    if not args.inprocess_restart:
        return []
    active = args.inprocess_active_world_size
    return broken(
        (
            importlib.util.find_spec(RESTARTS) is None,
            f"--inprocess-restart needs the package {RESTARTS}, which is not installed: "
            "run pip install nvidia-resiliency-ext, or drop the flag",
        ),
        (
            active not in (None, args.world_size),
            f"--inprocess-active-world-size must equal the number of processes ({args.world_size}); got {active}: "
            "reserve ranks are not supported, because flags are parsed before reserve ranks are set aside",
        ),
    )
