"""The routing ops: device-independent functions on tensors. This file picks the backend; ops/dispatch.py is another.

`document_scores` sums each document's router probabilities, `select_pool` turns the sums into a pool of experts, and
`pool_topk` routes tokens inside it. `draw_pool_sizes`, from `draw_bits`, and `top_p_pool_sizes` say how large a pool
is. `experts_used` and `document_statistics` are for metrics.

Two backends compute all but `top_p_pool_sizes`: `reference`, plain PyTorch and the definition, and `native`, compiled
from csrc/. The native one is taken where it can be; `EMO_OPS=reference` in the environment, or `backend=`, says
otherwise, and `EMO_OPS=native` makes it an error if the native one cannot run.
"""

import os
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from emo_megatron.ops import native, reference, sizes
from emo_megatron.ops.groups import limit_to_groups
from emo_megatron.ops.reference import Routing
from emo_megatron.ops.reference_documents import biased_scores, document_tokens, given_statistics
from emo_megatron.ops.sizes import top_p_pool_sizes

__all__ = [
    "Backend",
    "Routing",
    "available_backends",
    "best_backend",
    "biased_scores",
    "document_scores",
    "document_statistics",
    "document_tokens",
    "draw_bits",
    "draw_pool_sizes",
    "experts_used",
    "limit_to_groups",
    "pool_topk",
    "select_pool",
    "top_p_pool_sizes",
    "why_not_native",
]

Backend = Literal["reference", "native"]


def document_scores(logits_TE: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Sum each document's router probabilities or gates, exactly; options and result as reference.document_scores."""
    ops = _implementation(backend, logits_TE, num_experts=logits_TE.shape[-1], dtype=logits_TE.dtype)
    return ops.document_scores(logits_TE, **options)


def select_pool(scores_DE: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Choose each document's pool: its best-scored experts; options and result as reference.select_pool."""
    ops = _implementation(backend, scores_DE, num_experts=scores_DE.shape[-1])
    return ops.select_pool(scores_DE, **options)


def pool_topk(
    logits_TE: Tensor, *, top_k: int, num_groups: int | None = None, backend: Backend | None = None, **options: Any
) -> Routing:
    """Route each token to the top-k experts of its document's pool; options and result as reference.pool_topk."""
    limits = {"num_experts": logits_TE.shape[-1], "top_k": top_k, "num_groups": num_groups or 0}
    ops = _implementation(backend, logits_TE, dtype=logits_TE.dtype, **limits)
    return ops.pool_topk(logits_TE, top_k=top_k, num_groups=num_groups, **options)


def experts_used(routing_map_TE: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Experts that each document's tokens chose; options and result as reference_documents.experts_used."""
    ops = _implementation(backend, routing_map_TE, num_experts=routing_map_TE.shape[-1])
    return ops.experts_used(routing_map_TE, **options)


def document_statistics(
    scores_DE: Tensor | None = None,
    pool_DE: Tensor | None = None,
    used_DW: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Sums over documents for metrics, [5] int64; see reference_documents.document_statistics."""
    ops = _implementation(backend, given_statistics(scores_DE, pool_DE, used_DW))
    return ops.document_statistics(scores_DE, pool_DE, used_DW)


def draw_bits(
    sample_positions_D: Tensor, offsets_D: Tensor, *, stream: int = 0, backend: Backend | None = None, **options: Any
) -> Tensor:
    """Random bits for every layer and document; options and result as sizes.draw_bits."""
    ops = _implementation(backend, sample_positions_D)
    return ops.draw_bits(sample_positions_D, offsets_D, stream=stream, **options)


def draw_pool_sizes(sample_positions_D: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Draw each document's pool size, of one layer or of several at once; options as sizes.draw_pool_sizes."""
    return sizes.draw_pool_sizes(sample_positions_D, draw=partial(draw_bits, backend=backend), **options)


def why_not_native(
    device_type: str, *, num_experts: int = 1, top_k: int = 1, dtype: torch.dtype = torch.float32, num_groups: int = 0
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
        return f"the compiled ops take at most {native.MAX_EXPERTS} experts and top-{native.MAX_TOP_K}"
    if num_groups > native.MAX_GROUPS:
        return f"the compiled ops take at most {native.MAX_GROUPS} groups of experts"
    if dtype not in native.DTYPES:
        return f"the compiled ops take float32, bfloat16 and float16 logits, not {dtype}"
    return ""


# settled while torch.compile traces, which cannot look at files or the environment
@torch.compiler.assume_constant_result
def best_backend(
    device_type: str, num_experts: int = 1, top_k: int = 1, dtype: torch.dtype = torch.float32, num_groups: int = 0
) -> Backend:
    """The compiled ops where they run for such tensors, else the reference."""
    reason = why_not_native(device_type, num_experts=num_experts, top_k=top_k, dtype=dtype, num_groups=num_groups)
    if reason and _wanted() == "native":
        raise RuntimeError(
            f"EMO_OPS=native asks for the compiled ops, which cannot run here: {reason}. "
            "Unset EMO_OPS to run plain PyTorch there."
        )
    return "reference" if reason else "native"


def available_backends() -> dict[str, str]:
    """Every op backend, by device where that matters, with the reason it cannot be used; an empty one means it can."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {"reference": "", **{f"native ({device})": why_not_native(device) for device in devices}}


def _implementation(backend: Backend | None, tensor: Tensor, **limits: Any) -> Any:
    """The backend asked for, or the best one for this tensor."""
    if backend is None:
        backend = best_backend(tensor.device.type, **limits)
    return native.load_native() if backend == "native" else reference


def _wanted() -> str | None:
    """EMO_OPS, checked; None where nothing is asked for."""
    wanted = os.environ.get("EMO_OPS")
    if wanted is not None and wanted not in get_args(Backend):
        raise ValueError(f"EMO_OPS must be one of {get_args(Backend)}; got {wanted!r}")
    return wanted
