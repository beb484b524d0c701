"""Options of a host that this package does not support, and why: one class, one table, one or two lines a row.

The pool router replaces TopKRouter.routing(), so every option that lives in it must be honoured or stand here. Nothing
here loads Megatron: conversions to other formats describe what they cannot express by the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from emo_megatron.config import flag as flag_of


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One option of a host: the values that are supported, and why the others are not."""

    field: str
    """Attribute or key of the values that are looked at."""
    allowed: tuple[Any, ...]
    reason: str
    _: KW_ONLY
    flag: str | None = None
    """How messages name it, where that is not made of the field's name."""
    is_untried: bool = False
    """Nobody has built it, or run it. Otherwise it is impossible: it would not be the method, or not the run that the
    flags describe."""
    only_with_pools: bool = False
    """Whether the option is fine for the standard MoE."""

    def allows(self, value: Any) -> bool:
        """Whether `value` is allowed; a list is if it has items and each of them is."""
        if isinstance(value, list | tuple) and value not in self.allowed:
            return bool(value) and all(self.allows(item) for item in value)
        return value in self.allowed

    def message(self, value: Any, *, name_of: Callable[[str], str]) -> str:
        """What must hold, what came, why."""
        allowed = [repr(value) for value in self.allowed if value is not None]
        must = " or ".join(allowed + ["not given"] * (None in self.allowed))
        untried = " (untried)" if self.is_untried else ""
        return f"{self.flag or name_of(self.field)} must be {must}; got {value!r}: {self.reason}{untried}"


def problems_of(
    rows: Iterable[Unsupported], values: Any, *, has_pools: bool = True, name_of: Callable[[str], str] = flag_of
) -> list[str]:
    """The rows that `values` breaks, one sentence each.

    Args:
        rows: looked at in this order.
        values: an object with attributes, or a map; an option that it does not have is passed over.
        has_pools: whether rows that are fine for the standard MoE count.
        name_of: a field -> its name in messages.
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
        why="it is no loss but another choice of experts, which this router does not make",
    ),
    only("moe_router_dtype", "fp32", why="experts tie at the edge of the pool in less precision", only_with_pools=True),
    only(
        *("moe_router_score_function", "softmax", "sigmoid", "sqrtsoftplus"),
        why="other scores are not built inside a pool",
        is_untried=True,
    ),
    only("moe_router_topk_limited_devices", None, 0, why="it depends on the layout; use --moe-router-group-topk"),
    only("moe_router_force_load_balancing", False, why="random logits would choose the pools", only_with_pools=True),
    only("moe_router_force_biased", None, why="random biases would choose the pools", only_with_pools=True),
    only("moe_enable_routing_replay", False, why="it records the stock router's choice, which is not made here"),
    only("moe_expert_capacity_factor", None, why="a dropped token would change its document's experts"),
    only("mlp_chunks_for_training", 1, why="a chunk of a micro-batch does not know its documents", is_untried=True),
    only("cuda_graph_impl", "none", why="no graph takes the documents of each micro-batch", is_untried=True),
    only("transformer_impl", "local", "transformer_engine", why="inference-optimised layers have their own router"),
)
"""On Megatron's TransformerConfig; they hold wherever the pool layers are built."""

DEDUP = (
    only("moe_token_dispatcher_type", "alltoall", why="--pool-dispatcher dedup takes its place"),
    only("moe_shared_expert_overlap", False, why="shared experts run before the tokens leave", is_untried=True),
    only("moe_expert_rank_capacity_factor", None, why="it bounds HybridEP's buffers; these are as large as needed"),
    only("overlap_dispatch_backward_with_experts_wgrad", False, why="it has not been tried with it", is_untried=True),
)
"""On Megatron's TransformerConfig in runs with --pool-dispatcher dedup."""

SELECTION = (
    only("train_only", "experts", why="the other weights have no experts of their own"),
    only("mtp_num_layers", None, 0, why="a Selection names experts of the decoder's layers alone"),
    only("no_save_optim", True, why="Megatron stores the optimizer's state of all experts of a layer or of none"),
    only("expert_placement", None, why="it changes the numbers of experts; reorder, and make the Selection of that"),
)
"""On the parsed flags of runs with --train-selection."""

_NOT_LOADED = "it does not load weights through load_state_dict, where they are placed; use reorder"
_SCALES = "quantised experts have scales of their own, which do not change places; use reorder"
PLACEMENT = (
    only("mtp_num_layers", None, 0, why="no placement orders experts of multi-token prediction", is_untried=True),
    only("pool_forced", 0, why="the last experts are in every pool, and other experts would come last"),
    only("use_torch_fsdp2", False, why=_NOT_LOADED),
    only("use_megatron_fsdp", False, why=_NOT_LOADED),
    only("fp8", None, why=_SCALES, flag="--fp8-format"),
    only("fp4", None, why=_SCALES, flag="--fp4-format"),
    only("load_main_params_from_ckpt", False, why="the optimizer would step from weights in the old order"),
)
"""On the parsed flags of runs with --expert-placement."""

_BOTH_SCRIPTS = (
    only("fim_data", False, why="fill-in-the-middle has its own dataset", is_untried=True),
    only("hybrid_context_parallel", False, why="its batches are cut differently on every rank", is_untried=True),
    only("heterogeneous_layers_config_path", None, why="heterogeneous layers have another spec", is_untried=True),
    only("reset_attention_mask", False, why="--dataloader-inter-document-masking keeps attention to documents already"),
)
SCRIPT = (
    *_BOTH_SCRIPTS,
    only("logits_load_dir", None, why="distillation from stored logits is not built into this script", is_untried=True),
    only("spec", None, why="this script builds the pool spec itself; --spec is for pretrain_gpt.py"),
)
"""On the parsed flags: what pretrain_gpt.py does and pretrain_emo.py does not."""

CONVERSATIONS = (
    only("context_parallel_size", 1, why="with --sft it pads between conversations, and routers are not told where"),
    only("tokenizer_type", "SFTTokenizer", why="it reads the conversations of --sft"),
    only("mock_data", False, why="there are no made-up conversations for --sft"),
    only("reset_position_ids", False, why="with --sft positions restart with every conversation as it is"),
)
"""On the parsed flags of pretrain_emo.py with --sft; Megatron's dataset would fail on most at the first sample."""

_USE_OURS = "use examples/pretrain_emo.py"
_STAGES = f"Megatron's scripts give documents to the first and the last stage only; {_USE_OURS}"
_UNPLANNED = f"Megatron's scripts plan a micro-batch without its documents; {_USE_OURS}"
_PADDING_VOTES = f"Megatron's scripts count padding to the last conversation, and it would vote; {_USE_OURS}"
_VIRTUAL = (
    "virtual pipeline stages (--num-layers-per-virtual-pipeline-stage, --num-virtual-stages-per-pipeline-rank, "
    "--pipeline-model-parallel-layout, | in --hybrid-layer-pattern)"
)
HOST = (
    *_BOTH_SCRIPTS,
    only("context_parallel_size", 1, why=f"Megatron's scripts cut whole samples (Megatron-LM issue 6156); {_USE_OURS}"),
    only("pipeline_model_parallel_size", 1, 2, why=_STAGES, only_with_pools=True),
    only("virtual_pipeline_model_parallel_size", None, why=_STAGES, flag=_VIRTUAL, only_with_pools=True),
    only("overlap_moe_expert_parallel_comm", False, why=_UNPLANNED, only_with_pools=True),
    only("sft", False, why=_PADDING_VOTES, only_with_pools=True),
)
"""On the parsed flags of Megatron's own scripts: what these cannot do, and what would not be the pools' there."""
