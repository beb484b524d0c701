"""Time of each part of PoolRouter's forward pass, measured at the call, and the number of its operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from layers import POOLS, Layers
from timing import Estimate, estimate
from torch.utils._python_dispatch import TorchDispatchMode

from emo_megatron import balance, ops


def router_pieces(layers: Layers, *, rounds: int) -> dict[str, Estimate]:
    """Seconds a forward pass spends in each piece.

    On a GPU every piece waits for the device before and after, so small ones show their launches.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from emo_megatron.mcore.router import PoolRouter

    pieces = {
        "router, whole forward": (PoolRouter, "forward"),
        "gating (the stock router's matrix product)": (PoolRouter, "gating"),
        "document_scores": (ops, "document_scores"),
        "draw_pool_sizes, once per micro-batch for all layers": (ops, "draw_pool_sizes"),
        "select_pool": (ops, "select_pool"),
        "pool_topk": (ops, "pool_topk"),
        "balance loss": (balance, "load_balancing_loss"),
        "z loss": (balance, "z_loss"),
        "Megatron's metrics tracker, all records": (type(get_moe_metrics_tracker()), "record"),
    }
    spent: dict[str, list[float]] = {name: [] for name in pieces}
    forward = layers.router_steps(is_first_layer=True)[POOLS].forward
    forward()
    with ExitStack() as stack:
        for name, (owner, attribute) in pieces.items():
            timed = _timed(getattr(owner, attribute), spent[name])
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        for _ in range(rounds):
            for values in spent.values():
                values.append(0.0)
            forward()
    found = {name: estimate(values) for name, values in spent.items()}
    scopes = []
    for _ in range(rounds):
        start = _now()
        layers.new_scope()
        scopes.append(_now() - start)
    return found | {"scope, once per micro-batch for all layers": estimate(scopes)}


class _Operations(TorchDispatchMode):
    """Counts operations that compute: each is at least one kernel on a GPU, whatever it does there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = func.__name__.startswith(("empty", "new_empty", "detach"))
        self.count += not (allocates or func.is_view)
        return func(*args, **(kwargs or {}))


def count_operations(layers: Layers) -> dict[str, int]:
    """Operations in the forward pass of each layer's router."""
    counts = {}
    first = layers.router_steps(is_first_layer=True)[POOLS]
    for name, step in (layers.router_steps() | {f"{POOLS}, first layer and its scope": first}).items():
        step.forward()
        with _Operations() as operations:
            step.forward()
        counts[name] = operations.count
    return counts


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, which adds its seconds to the last entry of `spent`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        try:
            return function(*args, **kwargs)
        finally:
            spent[-1] += _now() - start

    return run


def _now() -> float:
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    return time.perf_counter()
