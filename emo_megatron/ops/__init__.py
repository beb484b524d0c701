"""The routing ops: device-independent functions on tensors. This page picks the backend.

`document_scores` sums each document's router probabilities, `select_pool` turns the sums into a pool of experts, and
`pool_topk` routes tokens inside it. `draw_pool_sizes` and `top_p_pool_sizes` say how large a pool is.
"""

from emo_megatron.ops.reference import (
    Routing,
    document_scores,
    experts_per_document,
    pool_topk,
    select_pool,
)
from emo_megatron.ops.sizes import draw_pool_sizes, top_p_pool_sizes

__all__ = [
    "Routing",
    "available_backends",
    "document_scores",
    "draw_pool_sizes",
    "experts_per_document",
    "pool_topk",
    "select_pool",
    "top_p_pool_sizes",
]


def available_backends() -> dict[str, str]:
    """Every op backend with the reason it cannot be used here; an empty reason means it can."""
    return {"reference": "", "native": "this version has no compiled ops"}
