"""What Megatron's flags of the router must be to each other, and to the pools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.moe import moe_layer

from emo_megatron.config import PoolConfig

GATES = ("sigmoid", "sqrtsoftplus")


def problems_with_routing(pool: PoolConfig, values: Any, *, only_asserted: bool = False) -> list[str]:
    """What does not go together, one sentence each.

    Args:
        pool: the method.
        values: Megatron's TransformerConfig or its parsed flags.
        only_asserted: look only for what Megatron stops at by an assertion when it makes the one of the other.
    """
    num_experts = _num_experts(values)
    # flags that another host's parser does not have are passed over
    if not num_experts or not hasattr(values, "moe_router_load_balancing_type"):
        return []
    asserted = [*_problems_with_balance(pool, values), *_problems_with_groups(pool, values, num_experts)]
    if only_asserted:
        return asserted
    return [*asserted, *_problems_with_bias(pool, values), *_problems_with_latents(values)]


def _num_experts(values: Any) -> int | None:
    """Routed experts, by either name."""
    found: int | None = getattr(values, "num_moe_experts", None) or getattr(values, "num_experts", None)
    return found


def _problems_with_balance(pool: PoolConfig, values: Any) -> Iterator[str]:
    kinds, coefficients = values.moe_router_load_balancing_type, values.moe_aux_loss_coeff
    if isinstance(kinds, list | tuple):
        is_list = isinstance(coefficients, list | tuple)
        if not is_list or len(coefficients) != len(kinds):
            yield (
                f"--moe-aux-loss-coeff must be {len(kinds)} numbers, one for each of "
                f"--moe-router-load-balancing-type {' '.join(kinds)}; got {coefficients!r}"
            )
        if len(set(kinds)) < len(kinds):
            yield f"--moe-router-load-balancing-type must name a loss once; got {' '.join(kinds)}"
    elif isinstance(coefficients, list | tuple):
        yield (
            f"--moe-aux-loss-coeff must be one number with --moe-router-load-balancing-type {kinds}; "
            f"got {coefficients!r}"
        )
    named = {kinds} if isinstance(kinds, str) else set(kinds)
    if pool.pool_balance == "running" and named <= {"aux_loss", "seq_aux_loss"}:
        yield (
            "--pool-balance must be micro without global_aux_loss, whose fraction it is about; got 'running' with "
            f"--moe-router-load-balancing-type {' '.join(sorted(named))}"
        )


def _problems_with_groups(pool: PoolConfig, values: Any, num_experts: int) -> Iterator[str]:
    groups, limit, top_k = (values.moe_router_num_groups, values.moe_router_group_topk, values.moe_router_topk)
    has_groups = bool(groups and limit)
    if pool.pool_group_scope == "document" and not (has_groups and limit < groups):
        yield (
            "--moe-router-num-groups, and a smaller --moe-router-group-topk, must be given with --pool-group-scope "
            f"document; got {groups} and {limit}"
        )
    if pool.is_on and bool(limit) != bool(groups) and (groups or 0) != 1:
        yield (
            "--moe-router-num-groups and --moe-router-group-topk go together, alone they limit nothing; got "
            f"{groups} and {limit}"
        )
    if not has_groups:
        return
    if num_experts % groups != 0:
        yield f"--moe-router-num-groups must divide --num-experts ({num_experts}); got {groups}"
        return
    if not 1 <= limit <= groups or limit > top_k:
        yield (
            f"--moe-router-group-topk must be at most --moe-router-num-groups ({groups}) and --moe-router-topk "
            f"({top_k}); got {limit}"
        )
        return
    held = num_experts // groups * limit
    if held < top_k:
        yield (
            f"--moe-router-group-topk must be larger: {limit} groups of {num_experts // groups} experts hold fewer "
            f"than --moe-router-topk ({top_k})"
        )
    if pool.pool_group_scope == "document":
        for name in ("pool_min", "pool_max", "pool_min_start", "pool_eval"):
            size = getattr(pool, name)
            if size is not None and size > held:
                yield (
                    f"--{name.replace('_', '-')} must be at most {held} with --pool-group-scope document: "
                    f"{limit} of {groups} groups hold no more experts; got {size}"
                )


def _problems_with_bias(pool: PoolConfig, values: Any) -> Iterator[str]:
    score, has_bias = values.moe_router_score_function, values.moe_router_enable_expert_bias
    if has_bias and score not in GATES:
        yield (
            "--moe-router-score-function must be sigmoid or sqrtsoftplus with --moe-router-enable-expert-bias; got "
            f"{score}"
        )
    if pool.pool_score == "gate_with_bias" and not (has_bias and score in GATES):
        yield (
            "--moe-router-enable-expert-bias and --moe-router-score-function sigmoid or sqrtsoftplus must be given "
            f"with --pool-score gate_with_bias; got {score} {'with' if has_bias else 'without'} a bias"
        )


def _problems_with_latents(values: Any) -> Iterator[str]:
    # Megatron would stop at an assertion while it builds the layers
    if values.moe_latent_size and not moe_layer.HAVE_TE:
        yield (
            f"--moe-latent-size {values.moe_latent_size} needs Transformer Engine, which has the projections to and "
            "from the latent size and is not installed"
        )
