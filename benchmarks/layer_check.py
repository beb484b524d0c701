"""The checks of bench_layer.py before timing: pools against the standard layer, ops against the reference, and experts.

Two exact routers may choose differently if the K-th and the next logit of a token are closer than routers.CLEAR_GAP, or
if a document's last expert inside the pool and its first one outside have the same score. Such tokens are left out:
their outputs are not compared, and they contribute no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import torch
from experts import GROUPED, SEQUENTIAL, stacked
from layers import LAYER_NUMBER, POOLS, SAME_CHOICES, STOCK, Layers
from routers import CLEAR_GAP, NUM_SPARE, is_clear_choice
from torch import Tensor

from emo_megatron import ops

Results = dict[str, Any]
"""Tensors by name; None for a weight without gradient."""


def check_routing(layers: Layers) -> None:
    """Compare pools of all experts with the standard layer, and real pools with the reference ops.

    Raises:
        ValueError: they differ, or a token left its document's pool: there is nothing to time.
    """
    logits_TE = _logits(layers)
    is_clear_T = is_clear_choice(logits_TE, top_k=layers.layers[STOCK].router.topk)
    _refuse_many_ties(is_clear_T)
    _compare(
        _results(layers, SAME_CHOICES, is_clear_T),
        _results(layers, STOCK, is_clear_T),
        tolerance=_tolerance(layers),
        says=f"the layer with {SAME_CHOICES} does not compute what the standard layer does",
    )
    map_TE, pool_DE, ids_T = _routed_in_pools(layers)
    with _reference_ops(layers):
        want_map_TE, want_pool_DE, _ = _routed_in_pools(layers)
    is_settled_D = _settled_documents(logits_TE, ids_T, pool_DE, want_pool_DE)
    in_pool_TE = logits_TE.masked_fill(~want_pool_DE[ids_T], float("-inf"))
    is_clear_T = is_clear_choice(in_pool_TE, top_k=layers.layers[POOLS].router.topk)
    _refuse_many_ties(is_clear_T)
    is_clear_T &= is_settled_D[ids_T]
    if not torch.equal(map_TE[is_clear_T], want_map_TE[is_clear_T]):
        raise ValueError(f"{POOLS} chooses other experts than with the reference ops, so nothing is reported")
    found = _results(layers, POOLS, is_clear_T)
    with _reference_ops(layers):
        want = _results(layers, POOLS, is_clear_T)
    _compare(
        found,
        want,
        tolerance=_tolerance(layers),
        says=f"the layer with {POOLS} does not compute what the same layer with the reference ops does",
    )


def check_experts(grouped: Layers, sequential: Layers) -> None:
    """Compare the layers over grouped_mm with those over SequentialMLP.

    Raises:
        ValueError: they differ.
        RuntimeError: torch cannot run grouped_mm on this device.
    """
    all_T = torch.ones_like(grouped.hidden_T1H[:, 0, 0], dtype=torch.bool)
    num_experts = len(sequential.layers[STOCK].experts.local_experts)
    for name in grouped.layers:
        want = _results(sequential, name, all_T)
        for grouped_name, linear in (("fc1_EFH", "linear_fc1"), ("fc2_EHF", "linear_fc2")):
            gradients = [
                want.pop(f"gradient of experts.local_experts.{expert}.{linear}.weight") for expert in range(num_experts)
            ]
            want[f"gradient of experts.{grouped_name}"] = stacked(gradients)
        _compare(
            _results(grouped, name, all_T),
            want,
            tolerance=_tolerance(grouped),
            says=f"the layer with {name} and experts over {GROUPED} does not compute what {SEQUENTIAL} does",
        )


def _logits(layers: Layers) -> Tensor:
    """[T, E] float32."""
    with torch.no_grad():
        logits_T1E: Tensor = layers.layers[POOLS].router.gating(layers.hidden_T1H)
    return logits_T1E.flatten(0, 1).float()


def _reference_ops(layers: Layers) -> mock._patch:
    return mock.patch.object(layers.layers[POOLS].router, "backend", return_value="reference")


def _routed_in_pools(layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    """The first micro-batch's map [T, E], pools [D, E] and document ids [T]."""
    router, scope = layers.layers[POOLS].router, layers.new_scope(0)
    router.scope = scope
    routing_map_TE: Tensor = router(layers.hidden_T1H)[1]
    pool_DE, ids_T = scope.pools[LAYER_NUMBER], scope.document_ids_T
    if (routing_map_TE & ~pool_DE[ids_T]).any():
        raise ValueError("tokens leave the pool of their document, so nothing is reported")
    return routing_map_TE, pool_DE, ids_T


def _settled_documents(logits_TE: Tensor, ids_T: Tensor, pool_DE: Tensor, want_pool_DE: Tensor) -> Tensor:
    """[D] bool: documents with the same pool in both. Few may differ, and only by experts that score alike.

    Raises:
        ValueError: more of them differ, or by more.
    """
    is_settled_D = (pool_DE == want_pool_DE).all(dim=-1)
    scores_DE = ops.document_scores(logits_TE, document_ids_T=ids_T, num_documents=len(pool_DE), backend="reference")
    for document in (~is_settled_D).nonzero().flatten().tolist():
        scores = scores_DE[document, pool_DE[document] != want_pool_DE[document]].double()
        if scores.max() - scores.min() > CLEAR_GAP * scores.max():
            raise ValueError(
                f"{POOLS} chooses another pool for document {document} than with the reference ops, "
                "so nothing is reported"
            )
    if (~is_settled_D).sum() > max(1, NUM_SPARE * len(pool_DE)):
        raise ValueError(
            f"{(~is_settled_D).sum()} of {len(pool_DE)} documents have a near tie in their pool, so nothing is reported"
        )
    return is_settled_D


def _refuse_many_ties(is_clear_T: Tensor) -> None:
    close = 1 - is_clear_T.float().mean().item()
    if close > NUM_SPARE:
        raise ValueError(f"{close:.2%} of the tokens are near ties, so nothing is reported")


def _results(layers: Layers, name: str, is_clear_T: Tensor) -> Results:
    """The output of the clear tokens of a layer's first micro-batch, and all gradients that come from them."""
    is_clear_T11 = is_clear_T[:, None, None]
    clear = dataclasses.replace(layers, upstream_T1H=layers.upstream_T1H * is_clear_T11)
    layer = clear.layers[name]
    step = clear.step(layer, router_only=False, get_scope=lambda: clear.new_scope(0))
    state = step.forward()
    grad_T1H, *gradients = step.backward(state)
    weights = [f"gradient of {weight}" for weight, _ in layer.named_parameters()]
    return {
        "output": state[1].detach() * is_clear_T11,
        "gradient of the input": grad_T1H * is_clear_T11,
        **dict(zip(weights, gradients, strict=True)),
    }


def _tolerance(layers: Layers) -> float:
    """Of the largest entry of a tensor."""
    return 1e-4 if layers.hidden_T1H.dtype == torch.float32 else 3e-2


def _compare(found: Results, wanted: Results, *, tolerance: float, says: str) -> None:
    """Refuse results that differ; `says` names what they are of.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"{says}: one has {sorted(found.keys() ^ wanted.keys())} alone")
    for what, want in wanted.items():
        got = found[what]
        if got is None or want is None:
            error = 0.0 if got is want else math.inf
        else:
            # an expert without tokens has a gradient of zeros
            largest = want.abs().max().clamp(min=1e-30)
            error = ((got - want).abs().max() / largest).item()
        if not error < tolerance:  # NaN is not below
            raise ValueError(f"{says}, so nothing is reported: its {what} differs by {error:.1e} of the largest")
