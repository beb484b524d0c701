"""The routing ops as functions without arguments, one function per input, for kernels.py to time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from inputs import Inputs, differentiable, pools_of, route, scores_of, upstream
from torch import Tensor

from emo_megatron import ops

Call = Callable[[], Any]


def nothing() -> None:
    """What must have run before an op that needs nothing."""


def routing_calls(inputs: list[Inputs]) -> Iterator[tuple[str, list[Call], Call]]:
    """Of every op: its name, a call for each input, and what must have run before."""
    scores = [scores_of(x) for x in inputs]
    pools = [pools_of(x) for x in inputs]
    pairs = list(zip(inputs, pools, strict=True))
    yield "document_scores", [partial(scores_of, x) for x in inputs], nothing
    select = partial(ops.select_pool, backend="native")
    sizes = [x.sizes_D for x in inputs]
    selects = [
        partial(select, scores_DE, pool_sizes_D=sizes_D) for scores_DE, sizes_D in zip(scores, sizes, strict=True)
    ]
    yield "select_pool", selects, nothing
    yield "pool_topk", [partial(route, x, pool_DE) for x, pool_DE in pairs], nothing
    yield from _metrics_calls(inputs, scores, pools)
    states: list[tuple[Tensor, tuple[Tensor, ...], list[Tensor]]] = []

    def forward() -> None:
        for x, pool_DE in pairs:
            x.logits_TE.requires_grad_()
            found = differentiable(route(x, pool_DE))
            states.append((x.logits_TE, found, [upstream(output_X) for output_X in found]))

    def backward(index: int) -> Any:
        leaf_TE, found, gradients = states[index]
        return torch.autograd.grad(found, [leaf_TE], gradients, retain_graph=True)

    backwards = [partial(backward, index) for index in range(len(pairs))]
    yield "pool_topk backward", backwards, forward


def _metrics_calls(
    inputs: list[Inputs], scores: list[Tensor], pools: list[Tensor]
) -> Iterator[tuple[str, list[Call], Call]]:
    used = [
        partial(
            *(ops.experts_used, route(x, pool_DE).routing_map_TE),
            document_ids_T=x.document_ids_T,
            num_documents=x.num_documents,
            backend="native",
        )
        for x, pool_DE in zip(inputs, pools, strict=True)
    ]
    yield "experts_used", used, nothing
    statistics = [
        partial(*(ops.document_statistics, scores_DE), pool_DE=pool_DE, used_DW=used_of(), backend="native")
        for scores_DE, pool_DE, used_of in zip(scores, pools, used, strict=True)
    ]
    yield "document_statistics", statistics, nothing
