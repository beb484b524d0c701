"""HybridEP's functions on one rank without a GPU."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor


def stand_in() -> Any:
    """Lets Megatron find them in the block."""
    functions = {"hybrid_ep_dispatch": _dispatch, "hybrid_ep_combine": _combine}
    functions["get_align_size_for_quantization"] = lambda _: 1
    return mock.patch.multiple("megatron.core.transformer.moe.token_dispatcher", **functions)


def _dispatch(
    x: Tensor, routing_map: Tensor, probs: Tensor, num_permuted_tokens: int | None = None, **_: Any
) -> tuple[Any, ...]:
    """Tokens by expert, those above the bound dropped."""
    experts, tokens = routing_map.T.nonzero(as_tuple=True)
    bound = len(tokens) if num_permuted_tokens is None else num_permuted_tokens
    is_over = torch.tensor([len(tokens) > bound]).int()
    tokens, experts = tokens[:bound], experts[:bound]
    counts = torch.bincount(experts, minlength=routing_map.shape[1])
    return x[tokens], probs[tokens, experts], None, counts, (tokens, x.shape, is_over)


def _combine(x: Tensor, handle: Any, **_: Any) -> Tensor:
    tokens, shape, _ = handle
    return x.new_zeros(shape).index_add(0, tokens, x)
