"""What the pool layers and `pretrain_emo.py` refuse, and why: one table, one row a host option.

The pool router replaces TopKRouter.routing(), so every option that lives in it must be honoured or refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore.routing_flags import problems_with_routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """One host option: the values that are allowed, and why the others are not."""

    field: str
    """Attribute of TransformerConfig or of the parsed flags."""
    allowed: tuple[Any, ...]
    kind: Literal["impossible", "untried"]
    """impossible: it would not be the method, or not the run that the flags describe. untried: nobody has built it, or
    run it."""
    reason: str
    flag: str | None = None
    """Command-line flag, where it is not the field's name."""
    only_with_pools: bool = False
    """Whether the option is fine for the standard MoE."""
    only_in_attention: bool = False
    """Whether the option is fine with --pool-documents routers."""

    def allows(self, value: Any) -> bool:
        """Whether `value` is allowed; a list is if each of its items is."""
        if isinstance(value, list | tuple) and value not in self.allowed:
            return all(self.allows(item) for item in value)
        return value in self.allowed

    def message(self, value: Any) -> str:
        """What must hold, what came, why."""
        name = self.flag or flag(self.field)
        allowed = " or ".join(repr(a) for a in self.allowed if a is not None) or "not given"
        if None in self.allowed and allowed != "not given":
            allowed += " or not given"
        untried = " (untried)" if self.kind == "untried" else ""
        return f"{name} must be {allowed}; got {value!r}: {self.reason}{untried}"


CONFIG_REFUSALS = (
    Refusal(
        field="moe_router_load_balancing_type",
        allowed=("global_aux_loss", "aux_loss", "seq_aux_loss", "none"),
        kind="impossible",
        reason="it is no loss but another choice of experts, which this router does not make",
    ),
    Refusal(
        field="moe_router_dtype",
        allowed=("fp32",),
        only_with_pools=True,
        kind="impossible",
        reason="in lower precision experts tie at the edge of the pool and of the top-k; add --moe-router-dtype fp32",
    ),
    Refusal(
        field="moe_router_score_function",
        allowed=("softmax", "sigmoid", "sqrtsoftplus"),
        kind="untried",
        reason="other scores are not built inside a pool",
    ),
    Refusal(
        field="moe_router_topk_limited_devices",
        allowed=(None, 0),
        kind="impossible",
        reason="its groups are the expert-parallel ranks, so that the model would depend on the layout; use "
        "--moe-router-num-groups and --moe-router-group-topk",
    ),
    Refusal(
        field="moe_router_force_load_balancing",
        allowed=(False,),
        only_with_pools=True,
        kind="impossible",
        reason="random logits would choose the pools; it is for benchmarks of the standard MoE",
    ),
    Refusal(
        field="moe_router_force_biased",
        allowed=(None,),
        only_with_pools=True,
        kind="impossible",
        reason="random biases would choose the pools; it is for benchmarks of the standard MoE",
    ),
    Refusal(
        field="moe_enable_routing_replay",
        allowed=(False,),
        kind="impossible",
        reason="replay records the stock router's choice, which is not made here",
    ),
    Refusal(
        field="moe_expert_capacity_factor",
        allowed=(None,),
        kind="impossible",
        reason="pools are dropless: a dropped token would change its document's experts",
    ),
    Refusal(
        field="mlp_chunks_for_training",
        allowed=(1,),
        kind="untried",
        reason="a chunk of a micro-batch that knows its documents is not built",
    ),
    Refusal(
        field="cuda_graph_impl",
        allowed=("none",),
        kind="untried",
        reason="graphs that take the documents of each micro-batch are not built",
    ),
    Refusal(
        field="transformer_impl",
        allowed=("local", "transformer_engine"),
        kind="impossible",
        reason="inference-optimised layers have a router of their own",
    ),
)
"""Rows on Megatron's TransformerConfig; they hold wherever the pool layers are built."""

DEDUP_REFUSALS = (
    Refusal(
        field="moe_token_dispatcher_type",
        allowed=("alltoall",),
        kind="impossible",
        reason="--pool-dispatcher dedup takes its place",
    ),
    Refusal(
        field="moe_shared_expert_overlap",
        allowed=(False,),
        kind="untried",
        reason="shared experts run before the tokens leave; Megatron's alltoall overlaps them",
    ),
    Refusal(
        field="moe_expert_rank_capacity_factor",
        allowed=(None,),
        kind="impossible",
        reason="it bounds the buffers of HybridEP and NCCL EP; this dispatcher sizes its own by what is sent",
    ),
    Refusal(
        field="overlap_dispatch_backward_with_experts_wgrad",
        allowed=(False,),
        kind="untried",
        reason="it has not been tried with it",
    ),
)
"""Rows on Megatron's TransformerConfig for runs with --pool-dispatcher dedup."""

_NOT_LOADED = "it does not load weights through load_state_dict, where they are placed; use relabel"
_SCALES = "quantised experts have scales of their own, which do not change places; use relabel"

PLACEMENT_REFUSALS = (
    Refusal(
        field="train_selection",
        allowed=(None,),
        kind="impossible",
        reason="a Selection names experts by the numbers that the placement changes; use relabel and make the "
        "Selection of its checkpoint",
    ),
    Refusal(
        field="mtp_num_layers",
        allowed=(None, 0),
        kind="untried",
        reason="a placement has no order for experts of multi-token prediction",
    ),
    Refusal(
        field="pool_forced",
        allowed=(0,),
        kind="impossible",
        reason="the last experts are in every pool, and other experts would come last",
    ),
    Refusal(field="use_torch_fsdp2", allowed=(False,), kind="impossible", reason=_NOT_LOADED),
    Refusal(field="use_megatron_fsdp", allowed=(False,), kind="impossible", reason=_NOT_LOADED),
    Refusal(field="fp8", flag="--fp8-format", allowed=(None,), kind="impossible", reason=_SCALES),
    Refusal(field="fp4", flag="--fp4-format", allowed=(None,), kind="impossible", reason=_SCALES),
    Refusal(
        field="load_main_params_from_ckpt",
        allowed=(False,),
        kind="impossible",
        reason="the optimizer would step from weights in the old order",
    ),
)
"""Rows on the parsed flags for runs with --expert-placement."""

SCRIPT_REFUSALS = (
    Refusal(field="fim_data", allowed=(False,), kind="untried", reason="fill-in-the-middle has its own dataset"),
    Refusal(
        field="logits_load_dir",
        allowed=(None,),
        kind="untried",
        reason="distillation from stored logits is not built into this script",
    ),
    Refusal(
        field="spec",
        allowed=(None,),
        kind="impossible",
        reason="this script builds the pool spec itself; --spec is for pretrain_gpt.py",
    ),
    Refusal(
        field="hybrid_context_parallel",
        allowed=(False,),
        kind="untried",
        reason="its batches are cut differently on every rank",
    ),
    Refusal(
        field="heterogeneous_layers_config_path",
        allowed=(None,),
        kind="untried",
        reason="heterogeneous layers are built by another spec",
    ),
    Refusal(
        field="reset_attention_mask",
        allowed=(False,),
        kind="impossible",
        reason="attention already keeps to documents with --dataloader-inter-document-masking",
    ),
)
"""Rows on the parsed flags: what pretrain_gpt.py does and pretrain_emo.py does not."""

_STAGES = (
    "Megatron's scripts build their datasets on the first and the last stage only, and the routers of every stage need "
    "document boundaries; use examples/pretrain_emo.py"
)

HOST_REFUSALS = (
    Refusal(
        field="context_parallel_size",
        allowed=(1,),
        kind="impossible",
        reason="Megatron's scripts cut packed samples as packed attention does not take them "
        "(NVIDIA/Megatron-LM issue 6156); use examples/pretrain_emo.py",
    ),
    Refusal(
        field="pipeline_model_parallel_size", allowed=(1, 2), only_with_pools=True, kind="impossible", reason=_STAGES
    ),
    Refusal(
        field="virtual_pipeline_model_parallel_size",
        flag="virtual pipeline stages (--num-layers-per-virtual-pipeline-stage, "
        "--num-virtual-stages-per-pipeline-rank, --pipeline-model-parallel-layout, | in --hybrid-layer-pattern)",
        allowed=(None,),
        only_with_pools=True,
        kind="impossible",
        reason=_STAGES,
    ),
    Refusal(
        field="overlap_moe_expert_parallel_comm",
        allowed=(False,),
        only_with_pools=True,
        kind="impossible",
        reason="Megatron's scripts plan a micro-batch without its document boundaries; use examples/pretrain_emo.py",
    ),
    Refusal(
        field="sft",
        allowed=(False,),
        only_with_pools=True,
        kind="impossible",
        reason="Megatron's scripts count padding to the last conversation, where it would have a vote in the pool; use "
        "examples/pretrain_emo.py",
    ),
    *(
        row
        for row in SCRIPT_REFUSALS
        if row.field
        in {"fim_data", "hybrid_context_parallel", "heterogeneous_layers_config_path", "reset_attention_mask"}
    ),
)
"""Rows on the parsed flags of Megatron's own scripts: what these cannot do, and what would not be the pools' there."""


def problems_with_config(pool: PoolConfig, config: TransformerConfig) -> list[str]:
    """What a model of this configuration cannot do with the pool layers, one sentence each."""
    if not config.num_moe_experts:
        return ["--num-experts must be given: the pool layers are mixture-of-experts layers"]
    problems = pool.problems_with_model(num_experts=config.num_moe_experts, top_k=config.moe_router_topk)
    rows = CONFIG_REFUSALS + (DEDUP_REFUSALS if pool.pool_dispatcher == "dedup" else ())
    return problems + problems_with_routing(pool, config) + problems_of(rows, config, pool)


def problems_of(refusals: Sequence[Refusal], values: Any, pool: PoolConfig) -> list[str]:
    """The rows that `values` breaks, one sentence each; rows on options this host does not have are passed over."""
    return [
        refusal.message(getattr(values, refusal.field))
        for refusal in refusals
        if hasattr(values, refusal.field)
        and (pool.is_on or not refusal.only_with_pools)
        and (pool.pool_documents == "attention" or not refusal.only_in_attention)
        and not refusal.allows(getattr(values, refusal.field))
    ]
