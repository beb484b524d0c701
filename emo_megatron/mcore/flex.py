"""Megatron's flex dispatchers with a pool router: padding stays at home, and a token goes where it is routed.

DeepEP's and NCCL EP's managers ignore the routing map and send every token to the experts of its largest weights.
Padding has no weight at all, so all of it would go to the same experts, and an expert whose weight underflowed to 0
would be swapped for another one, perhaps outside the pool. Here both follow the map.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor


def leaves_padding_out(config: Any) -> bool:
    """Whether the dispatcher takes tokens that go nowhere: DeepEP and HybridEP do.

    All-to-all counts on K experts a token, and whether NCCL EP takes fewer is not documented: there padding goes
    where its own logits send it, which spreads it.
    """
    return config.moe_token_dispatcher_type == "flex" and _backend(config) in ("deepep", "hybridep")


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
        routing_map.reshape(len(routing_map), -1), probs.reshape(len(probs), -1), top_k=manager.router_topk
    )


def indices_of_map(routing_map_TE: Tensor, probs_TE: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
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
