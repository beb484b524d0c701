"""The routing ops: device-independent functions on tensors. This file picks the backend; ops/dispatch.py is another.

`document_scores` sums each document's router probabilities, `select_pool` turns the sums into a pool of experts, and
`pool_topk` routes tokens inside it. `draw_pool_sizes` and `top_p_pool_sizes` say how large a pool is.

Two backends compute the first three: `reference`, plain PyTorch and the definition, and `native`, compiled from csrc/.
The native one is taken where it can be; `EMO_OPS=reference` in the environment, or `backend=`, says otherwise.
"""

import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from emo_megatron.ops import native, reference
from emo_megatron.ops.reference import Routing, experts_per_document
from emo_megatron.ops.sizes import draw_pool_sizes, top_p_pool_sizes

__all__ = [
    "Backend",
    "Routing",
    "available_backends",
    "best_backend",
    "document_scores",
    "draw_pool_sizes",
    "experts_per_document",
    "pool_topk",
    "select_pool",
    "top_p_pool_sizes",
    "why_not_native",
]

Backend = Literal["reference", "native"]


def document_scores(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor,
    num_documents: int,
    backend: Backend | None = None,
) -> Tensor:
    """Sum each document's router probabilities, exactly; see reference.document_scores."""
    ops = _implementation(backend, logits_TE, dtype=logits_TE.dtype)
    scores_DE: Tensor = ops.document_scores(
        logits_TE, document_ids_T=document_ids_T, num_documents=num_documents
    )
    return scores_DE


def select_pool(
    scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0, backend: Backend | None = None
) -> Tensor:
    """Choose each document's pool: its best-scored experts; see reference.select_pool."""
    ops = _implementation(backend, scores_DE)
    pool_DE: Tensor = ops.select_pool(scores_DE, pool_sizes_D=pool_sizes_D, num_forced=num_forced)
    return pool_DE


def pool_topk(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor | None = None,
    pool_DE: Tensor | None = None,
    top_k: int,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    pre_softmax: bool = True,
    expert_bias_E: Tensor | None = None,
    scaling_factor: float | None = None,
    mask: Literal["logits", "selection"] = "logits",
    backend: Backend | None = None,
) -> Routing:
    """Route each token to the top-k experts of its document's pool; see reference.pool_topk."""
    ops = _implementation(backend, logits_TE, dtype=logits_TE.dtype, top_k=top_k)
    routing: Routing = ops.pool_topk(
        logits_TE,
        document_ids_T=document_ids_T,
        pool_DE=pool_DE,
        top_k=top_k,
        score_function=score_function,
        pre_softmax=pre_softmax,
        expert_bias_E=expert_bias_E,
        scaling_factor=scaling_factor,
        mask=mask,
    )
    return routing


def why_not_native(
    device_type: str,
    *,
    num_experts: int = 1,
    top_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Why the reference ops run for such tensors instead of the compiled ones; empty where the compiled ones run."""
    if _wanted() == "reference":
        return "EMO_OPS=reference is set"
    try:
        native.load_native()
    except RuntimeError as error:
        return str(error)
    if reason := native.why_no_kernels(device_type):
        return reason
    if num_experts > native.MAX_EXPERTS or top_k > native.MAX_TOP_K:
        return (
            f"the compiled ops take at most {native.MAX_EXPERTS} experts and top-{native.MAX_TOP_K}"
        )
    if dtype not in native.DTYPES:
        return f"the compiled ops take float32, bfloat16 and float16 logits, not {dtype}"
    return ""


# settled while torch.compile traces, which cannot look at files or the environment
@torch.compiler.assume_constant_result
def best_backend(
    device_type: str,
    num_experts: int = 1,
    top_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Backend:
    """The compiled ops where they run for such tensors, else the reference."""
    reason = why_not_native(device_type, num_experts=num_experts, top_k=top_k, dtype=dtype)
    return "reference" if reason else "native"


def available_backends() -> dict[str, str]:
    """Every op backend, by device where that matters, with the reason it cannot be used; an empty one means it can."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {"reference": "", **{f"native ({device})": why_not_native(device) for device in devices}}


def _implementation(
    backend: Backend | None,
    tensor_XE: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    top_k: int = 1,
) -> Any:
    """The backend asked for, or the best one for this tensor."""
    if backend is None:
        backend = best_backend(tensor_XE.device.type, tensor_XE.shape[-1], top_k, dtype)
    return native.load_native() if backend == "native" else reference


def _wanted() -> str:
    """EMO_OPS, checked."""
    wanted = os.environ.get("EMO_OPS", "native")
    if wanted not in get_args(Backend):
        raise ValueError(f"EMO_OPS must be one of {get_args(Backend)}; got {wanted!r}")
    return wanted
