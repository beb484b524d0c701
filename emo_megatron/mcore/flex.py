"""Megatron's flex dispatchers with a pool router: padding stays at home, and a token goes where it is routed.

DeepEP's and NCCL EP's managers ignore the routing map and send every token to the experts of its largest weights.
Padding has no weight at all, so all of it would go to the same experts, and an expert whose weight underflowed to 0
would be swapped for another one, perhaps outside the pool. Here both follow the map.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def leaves_padding_out(config: Any) -> bool:
    """Whether the dispatcher takes tokens that go nowhere: DeepEP and HybridEP do.

    All-to-all counts on K experts a token, and whether NCCL EP takes fewer is not documented: there padding goes
    where its own logits send it, which spreads it.
    """
    return config.moe_token_dispatcher_type == "flex" and _backend(config) in (
        "deepep",
        "hybridep",
    )


def follow_routing_map(dispatcher: Any, config: Any) -> None:
    """Let a flex dispatcher's manager choose by the routing map; other dispatchers do so already.

    Args:
        dispatcher: of the MoE layer.
        config: Megatron's configuration of the model.
    """
    if config.moe_token_dispatcher_type != "flex" or _backend(config) == "hybridep":
        # HybridEP's manager goes by the map
        return
    manager = dispatcher._comm_manager
    # bound, not closed over the manager: a copy of the layer has a manager of its own
    manager.setup_metadata = types.MethodType(_setup_metadata, manager)


def _setup_metadata(manager: Any, routing_map: Tensor, probs: Tensor) -> None:
    type(manager).setup_metadata(manager, routing_map, probs)
    manager.token_indices, manager.token_probs = indices_of_map(
        routing_map.reshape(len(routing_map), -1),
        probs.reshape(len(probs), -1),
        top_k=manager.router_topk,
    )


def follow_reruns(dispatcher: Any, router: Any) -> None:
    """Let a flex dispatcher tell its router when the host runs a step again.

    With --moe-expert-rank-capacity-factor megatron.training reads, once a step and before the optimizer, whether a
    rank's buffer was too small, and if so runs the step again without a bound. It resets the flags in between.

    Args:
        dispatcher: of the MoE layer; those without such a flag stay as they are.
        router: the layer's PoolRouter.
    """
    if hasattr(dispatcher, "reset_over_budget"):
        # attributes, not a closure: a copy of the layer has a router of its own
        dispatcher.pool_router = router
        dispatcher.reset_over_budget = types.MethodType(_reset_over_budget, dispatcher)


def _reset_over_budget(dispatcher: Any) -> None:
    type(dispatcher).reset_over_budget(dispatcher)
    dispatcher.pool_router.start_step_over()


def raise_over_budget(model: Iterable[torch.nn.Module]) -> None:
    """Refuse a step in which a dispatcher dropped tokens. Every rank calls it after backward, before the optimizer.

    For training loops of one's own; megatron.training runs such a step again by itself. Waits for the device.

    Args:
        model: this rank's chunks.

    Raises:
        ValueError: on all ranks, if a rank received more tokens than --moe-expert-rank-capacity-factor allows.
    """
    dispatchers = [
        module.token_dispatcher
        for chunk in model
        for module in chunk.modules()
        if hasattr(getattr(module, "token_dispatcher", None), "check_over_budget")
    ]
    flags = [d.check_over_budget() for d in dispatchers]
    flags_L = [flag.view(-1)[0] for flag in flags if flag is not None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dropped = torch.stack(flags_L).any() if flags_L else torch.zeros((), device=device)
    num_ranks = dropped.to(torch.int32)
    torch.distributed.all_reduce(num_ranks)
    if (count := int(num_ranks)) > 0:
        raise ValueError(
            f"tokens of this step were dropped on {count} ranks, whose buffers were too small: raise "
            "--moe-expert-rank-capacity-factor, which must hold for the most tokens that a rank receives"
        )


def indices_of_map(
    routing_map_TE: Tensor, probs_TE: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """The experts of every token, [T, K] int64 with -1 for none, and their weights, [T, K], differentiable.

    Args:
        routing_map_TE: [T, E] bool, at most K True per token.
        probs_TE: [T, E].
        top_k: K.
    """
    # the order of a token's experts is of no importance, so that of equal keys is not either
    is_sent_TK, experts_TK = torch.topk(routing_map_TE.to(probs_TE.dtype), top_k, dim=-1)
    weights_TK = probs_TE.gather(1, experts_TK)
    return experts_TK.masked_fill(is_sent_TK == 0, -1), weights_TK


def _backend(config: Any) -> str:
    return str(config.moe_flex_dispatcher_backend)
