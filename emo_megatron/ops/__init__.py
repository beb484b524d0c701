"""The routing ops: device-independent functions on tensors. This file chooses the backend. See also ops/dispatch.py.

`document_scores` sums each document's router probabilities. `select_pool` chooses a pool of experts from the sums.
`pool_topk` routes tokens inside their pools. `draw_pool_sizes` (which uses `draw_bits`) and `top_p_pool_sizes` compute
the sizes of pools. `experts_used` and `document_statistics` are for metrics.

All ops except `top_p_pool_sizes` have two backends: `reference`, the reference implementation in plain PyTorch, and
`native`, compiled from csrc/. The native backend runs if it is available. The environment variable `EMO_OPS=reference`
or the argument `backend=` selects another; with `EMO_OPS=native`, an unavailable native backend is an error.
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
    """Sum each document's router probabilities or gates, exactly; see reference.document_scores."""
    ops = _implementation(backend, logits_TE, num_experts=logits_TE.shape[-1], dtype=logits_TE.dtype)
    return ops.document_scores(logits_TE, **options)


def select_pool(scores_DE: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Choose each document's pool: its best-scored experts; see reference.select_pool."""
    ops = _implementation(backend, scores_DE, num_experts=scores_DE.shape[-1])
    return ops.select_pool(scores_DE, **options)


def pool_topk(
    logits_TE: Tensor, *, top_k: int, num_groups: int | None = None, backend: Backend | None = None, **options: Any
) -> Routing:
    """Route each token to the top-k experts of its document's pool; see reference.pool_topk."""
    limits = {"num_experts": logits_TE.shape[-1], "top_k": top_k, "num_groups": num_groups or 0}
    ops = _implementation(backend, logits_TE, dtype=logits_TE.dtype, **limits)
    return ops.pool_topk(logits_TE, top_k=top_k, num_groups=num_groups, **options)


def experts_used(routing_map_TE: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Experts that each document's tokens chose; see reference_documents.experts_used."""
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
    """Random bits per layer and document; see sizes.draw_bits."""
    ops = _implementation(backend, sample_positions_D)
    return ops.draw_bits(sample_positions_D, offsets_D, stream=stream, **options)


def draw_pool_sizes(sample_positions_D: Tensor, *, backend: Backend | None = None, **options: Any) -> Tensor:
    """Draw each document's pool size for one or several layers; see sizes.draw_pool_sizes."""
    return sizes.draw_pool_sizes(sample_positions_D, draw=partial(draw_bits, backend=backend), **options)


def why_not_native(
    device_type: str, *, num_experts: int = 1, top_k: int = 1, dtype: torch.dtype = torch.float32, num_groups: int = 0
) -> str:
    """Why the reference ops run for such tensors instead of the compiled ops; empty if the compiled ops run."""
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


# a constant for torch.compile, which cannot trace reads of files or of the environment
@torch.compiler.assume_constant_result
def best_backend(
    device_type: str, num_experts: int = 1, top_k: int = 1, dtype: torch.dtype = torch.float32, num_groups: int = 0
) -> Backend:
    """The compiled ops if they can run for such tensors, else the reference ops."""
    reason = why_not_native(device_type, num_experts=num_experts, top_k=top_k, dtype=dtype, num_groups=num_groups)
    if reason and _wanted() == "native":
        raise RuntimeError(
            f"EMO_OPS=native requires the compiled ops, which cannot run here: {reason}. "
            "Unset EMO_OPS to run the reference ops in plain PyTorch."
        )
    return "reference" if reason else "native"


def available_backends() -> dict[str, str]:
    """Backend, with its device for native -> the reason why it is not available; empty if the backend is available."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {"reference": "", **{f"native ({device})": why_not_native(device) for device in devices}}


def _implementation(backend: Backend | None, tensor: Tensor, **limits: Any) -> Any:
    """The module or object of the given backend; None: of the best backend for this tensor."""
    if backend is None:
        backend = best_backend(tensor.device.type, **limits)
    return native.load_native() if backend == "native" else reference


def _wanted() -> str | None:
    """The checked value of EMO_OPS; None if the variable is not set."""
    wanted = os.environ.get("EMO_OPS")
    if wanted is not None and wanted not in get_args(Backend):
        raise ValueError(f"EMO_OPS must be one of {get_args(Backend)}; got {wanted!r}")
    return wanted
