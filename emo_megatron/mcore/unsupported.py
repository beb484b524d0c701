"""Options of the host that this package does not support, and the reasons, as tables of `Unsupported` rows.

The pool router replaces TopKRouter.routing(). Every option of that method must be implemented or listed here. This
module does not import Megatron, because conversions to other checkpoint formats use the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from emo_megatron.config import flag as flag_of


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One option of the host: the supported values, and why other values are not supported."""

    field: str
    """Attribute or key of the configuration."""
    allowed: tuple[Any, ...]
    reason: str
    _: KW_ONLY
    flag: str | None = None
    """The option's name in messages; None: made from the field's name."""
    is_untried: bool = False
    """True: other values are not implemented. False: other values are impossible, because the run would not be the
    method or would not do what the flags say."""
    only_with_pools: bool = False
    """Whether the standard MoE supports every value."""

    def allows(self, value: Any) -> bool:
        """Whether `value` is supported; a list must have items, and each item must be supported."""
        if isinstance(value, list | tuple) and value not in self.allowed:
            return bool(value) and all(self.allows(item) for item in value)
        return value in self.allowed

    def message(self, value: Any, *, name_of: Callable[[str], str]) -> str:
        """One line: the supported values, the given value and the reason."""
        name = self.flag or name_of(self.field)
        reason = f"{self.reason} (not implemented)" if self.is_untried else self.reason
        if name.startswith("--") and isinstance(self.allowed[0], bool):
            # a flag without a value
            return f"{name} must {'' if self.allowed[0] else 'not '}be given: {reason}"
        if self.allowed == (None,):
            return f"{name} must not be given; got {value!r}: {reason}"
        allowed = [repr(value) for value in self.allowed if value is not None]
        must = " or ".join(allowed + ["not given"] * (None in self.allowed))
        return f"{name} must be {must}; got {value!r}: {reason}"


def problems_of(
    rows: Iterable[Unsupported], values: Any, *, has_pools: bool = True, name_of: Callable[[str], str] = flag_of
) -> list[str]:
    """One message for each row whose option has an unsupported value.

    Args:
        rows: checked in this order.
        values: the configuration, an object with attributes or a map; options that are missing there are skipped.
        has_pools: whether the run has pools. If not, rows with `only_with_pools` are skipped.
        name_of: maps a field to the option's name in messages.
    """
    rows = tuple(rows)
    if not isinstance(values, Mapping):
        values = {row.field: getattr(values, row.field) for row in rows if hasattr(values, row.field)}
    return [
        row.message(values[row.field], name_of=name_of)
        for row in rows
        if row.field in values and (has_pools or not row.only_with_pools) and not row.allows(values[row.field])
    ]


def only(field: str, *allowed: Any, why: str, **options: Any) -> Unsupported:
    """A row of a table."""
    return Unsupported(field, allowed, why, **options)


MODEL = (
    only(
        *("moe_router_load_balancing_type", "global_aux_loss", "aux_loss", "seq_aux_loss", "none"),
        why="other types change the choice of experts, which the pool router does not implement",
    ),
    only("moe_router_dtype", "fp32", why="lower precision makes experts tie at a pool's edge", only_with_pools=True),
    only(
        *("moe_router_score_function", "softmax", "sigmoid", "sqrtsoftplus"),
        why="pools support only these score functions",
        is_untried=True,
    ),
    only(
        "moe_router_topk_limited_devices", None, 0, why="the limit depends on the layout; use --moe-router-group-topk"
    ),
    only("moe_router_force_load_balancing", False, why="random logits would choose the pools", only_with_pools=True),
    only("moe_router_force_biased", None, why="random biases would choose the pools", only_with_pools=True),
    only("moe_enable_routing_replay", False, why="it records choices of Megatron's router, which is replaced here"),
    only("moe_expert_capacity_factor", None, why="a dropped token would change its document's experts"),
    only("mlp_chunks_for_training", 1, why="chunks of a micro-batch carry no document boundaries", is_untried=True),
    only("cuda_graph_impl", "none", why="graphs have no input for the documents of a micro-batch", is_untried=True),
    only("transformer_impl", "local", "transformer_engine", why="inference-optimised layers have their own router"),
)
"""Fields of Megatron's TransformerConfig, checked for every model with pool layers."""

DEDUP = (
    only(
        *("moe_token_dispatcher_type", "alltoall"), why="--pool-dispatcher dedup replaces only the alltoall dispatcher"
    ),
    only("moe_shared_expert_overlap", False, why="shared experts run before tokens are sent", is_untried=True),
    only("moe_expert_rank_capacity_factor", None, why="it limits buffers of HybridEP, which dedup does not use"),
    only("overlap_dispatch_backward_with_experts_wgrad", False, why="dedup has no such overlap", is_untried=True),
)
"""Fields of Megatron's TransformerConfig, checked for runs with --pool-dispatcher dedup."""

SELECTION = (
    only("train_only", "experts", why="a Selection names experts, and other weights belong to no expert"),
    only("mtp_num_layers", None, 0, why="experts of multi-token prediction are not frozen", is_untried=True),
    only("no_save_optim", True, why="Megatron cannot store optimizer state for only some experts of a layer"),
    only(
        *("expert_placement", None),
        why="it changes expert indices; run the command reorder, and make the Selection from the reordered checkpoint",
    ),
)
"""Parsed flags, checked for runs with --train-selection."""

_NOT_LOADED = "weights are reordered in load_state_dict, which this option bypasses; use the command reorder"
_PREDICTION = "experts of multi-token prediction are not reordered while they are loaded; use the command reorder"
_SCALES = "quantised experts have scales, which would keep the old order; use the command reorder"
PLACEMENT = (
    only("mtp_num_layers", None, 0, why=_PREDICTION, is_untried=True),
    only("pool_forced", 0, why="forced experts are the last of a layer, and a placement moves others there"),
    only("use_torch_fsdp2", False, why=_NOT_LOADED),
    only("use_megatron_fsdp", False, why=_NOT_LOADED),
    only("fp8", None, why=_SCALES, flag="--fp8-format"),
    only("fp4", None, why=_SCALES, flag="--fp4-format"),
    only("load_main_params_from_ckpt", False, why="the optimizer would use weights in the old order"),
)
"""Parsed flags, checked for runs with --expert-placement."""

_BOTH_SCRIPTS = (
    only("fim_data", False, why="fill-in-the-middle has its own dataset class", is_untried=True),
    only("hybrid_context_parallel", False, why="every rank cuts its batches differently", is_untried=True),
    only("heterogeneous_layers_config_path", None, why="heterogeneous layers use another spec", is_untried=True),
    only("reset_attention_mask", False, why="use --dataloader-inter-document-masking to keep attention in documents"),
)
SCRIPT = (
    *_BOTH_SCRIPTS,
    only("logits_load_dir", None, why="this script has no distillation from logits", is_untried=True),
    only("spec", None, why="this script builds the pool spec itself; use --spec with pretrain_gpt.py"),
)
"""Parsed flags that pretrain_gpt.py supports and pretrain_emo.py does not."""

CONVERSATIONS = (
    only(
        *("context_parallel_size", 1),
        why="with --sft Megatron then pads between conversations without reporting the padding to routers",
    ),
    only("tokenizer_type", "SFTTokenizer", why="--sft requires a tokenizer for conversations"),
    only("mock_data", False, why="Megatron has no mock conversations for --sft"),
    only("reset_position_ids", False, why="with --sft positions already restart at every conversation; drop the flag"),
)
"""Parsed flags of pretrain_emo.py with --sft. Megatron's dataset would fail at the first sample for most of them."""

_USE_OURS = "use examples/pretrain_emo.py"
_STAGES = f"Megatron's scripts give document boundaries only to the first and last stage; {_USE_OURS}"
_UNPLANNED = f"schedule plans of Megatron's scripts carry no document boundaries; {_USE_OURS}"
_PADDING_VOTES = f"Megatron's scripts add padding to the last conversation, which affects its pool; {_USE_OURS}"
_VIRTUAL = (
    "virtual pipeline stages (--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank, "
    "--pipeline-model-parallel-layout, more segments in --hybrid-layer-pattern than pipeline stages)"
)
HOST = (
    *_BOTH_SCRIPTS,
    only(
        "context_parallel_size",
        1,
        why=f"Megatron's scripts cut samples, not documents (Megatron-LM issue 6156); {_USE_OURS}",
    ),
    only("pipeline_model_parallel_size", 1, 2, why=_STAGES, only_with_pools=True),
    only("virtual_pipeline_model_parallel_size", None, why=_STAGES, flag=_VIRTUAL, only_with_pools=True),
    only("overlap_moe_expert_parallel_comm", False, why=_UNPLANNED, only_with_pools=True),
    only("sft", False, why=_PADDING_VOTES, only_with_pools=True),
)
"""Parsed flags, checked for Megatron's own scripts. Other values are not supported there, or break pools there."""
