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

from emo_megatron.ops import native, reference, reference_documents, sizes
from emo_megatron.ops.groups import limit_to_groups
from emo_megatron.ops.reference import Routing
from emo_megatron.ops.reference_pools import ScoreFunction, biased_scores, document_tokens
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


def document_scores(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor,
    num_documents: int,
    score_function: ScoreFunction = "softmax",
    backend: Backend | None = None,
) -> Tensor:
    """Sum each document's router probabilities or gates, exactly; see reference.document_scores."""
    ops = _implementation(backend, logits_TE, logits_TE.shape[-1], dtype=logits_TE.dtype)
    scores_DE: Tensor = ops.document_scores(
        logits_TE, document_ids_T=document_ids_T, num_documents=num_documents, score_function=score_function
    )
    return scores_DE


def select_pool(
    scores_DE: Tensor, *, pool_sizes_D: Tensor, num_forced: int = 0, backend: Backend | None = None
) -> Tensor:
    """Choose each document's pool: its best-scored experts; see reference.select_pool."""
    ops = _implementation(backend, scores_DE, scores_DE.shape[-1])
    pool_DE: Tensor = ops.select_pool(scores_DE, pool_sizes_D=pool_sizes_D, num_forced=num_forced)
    return pool_DE


def pool_topk(
    logits_TE: Tensor,
    *,
    document_ids_T: Tensor | None = None,
    pool_DE: Tensor | None = None,
    top_k: int,
    score_function: ScoreFunction = "softmax",
    pre_softmax: bool = True,
    expert_bias_E: Tensor | None = None,
    scaling_factor: float | None = None,
    mask: Literal["logits", "selection"] = "logits",
    num_groups: int | None = None,
    group_topk: int | None = None,
    num_documents: int | None = None,
    backend: Backend | None = None,
) -> Routing:
    """Route each token to the top-k experts of its document's pool; see reference.pool_topk."""
    ops = _implementation(backend, logits_TE, logits_TE.shape[-1], logits_TE.dtype, top_k, num_groups or 0)
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
        num_groups=num_groups,
        group_topk=group_topk,
        num_documents=num_documents,
    )
    return routing


def experts_used(
    routing_map_TE: Tensor, *, document_ids_T: Tensor, num_documents: int, backend: Backend | None = None
) -> Tensor:
    """Experts that each document's tokens chose, [D, ceil(E / 32)] int32; see reference_documents.experts_used."""
    ops = _documents(_implementation(backend, routing_map_TE, routing_map_TE.shape[-1]))
    used_DW: Tensor = ops.experts_used(routing_map_TE, document_ids_T=document_ids_T, num_documents=num_documents)
    return used_DW


def document_statistics(
    scores_DE: Tensor | None = None,
    pool_DE: Tensor | None = None,
    used_DW: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Sums over documents for metrics, [5] int64; see reference_documents.document_statistics."""
    given_DX = reference_documents.given_statistics(scores_DE, pool_DE, used_DW)
    ops = _documents(_implementation(backend, given_DX))
    statistics: Tensor = ops.document_statistics(scores_DE, pool_DE, used_DW)
    return statistics


def draw_bits(
    sample_positions_D: Tensor,
    offsets_D: Tensor,
    *,
    layers: range | Tensor,
    seed: int,
    stream: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Random bits for every layer and document, [L, D] int64; see sizes.draw_bits."""
    ops = _implementation(backend, sample_positions_D)
    draw = sizes.draw_bits if ops is reference else ops.draw_bits
    bits_LD: Tensor = draw(sample_positions_D, offsets_D, layers=layers, seed=seed, stream=stream)
    return bits_LD


def draw_pool_sizes(
    sample_positions_D: Tensor,
    *,
    offsets_D: Tensor,
    layer_number: int | range | Tensor,
    seed: int,
    low: int,
    high: int,
    skew: float = 1.0,
    unrestricted_share: float = 0.0,
    num_experts: int,
    backend: Backend | None = None,
) -> Tensor:
    """Draw each document's pool size, of one layer or of several at once; see sizes.draw_pool_sizes."""
    return sizes.draw_pool_sizes(
        sample_positions_D,
        offsets_D=offsets_D,
        layer_number=layer_number,
        seed=seed,
        low=low,
        high=high,
        skew=skew,
        unrestricted_share=unrestricted_share,
        num_experts=num_experts,
        draw=partial(draw_bits, backend=backend),
    )


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
    """The compiled ops where they run for such tensors, else the reference.

    Raises:
        RuntimeError: the compiled ops cannot run, and EMO_OPS=native asks for them.
    """
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


def _implementation(
    backend: Backend | None,
    tensor: Tensor,
    num_experts: int = 1,
    dtype: torch.dtype = torch.float32,
    top_k: int = 1,
    num_groups: int = 0,
) -> Any:
    """The backend asked for, or the best one for this tensor."""
    if backend is None:
        backend = best_backend(tensor.device.type, num_experts, top_k, dtype, num_groups)
    return native.load_native() if backend == "native" else reference


def _documents(ops: Any) -> Any:
    """Where that backend keeps its ops for metrics."""
    return reference_documents if ops is reference else ops


def _wanted() -> str | None:
    """EMO_OPS, checked; None where nothing is asked for."""
    wanted = os.environ.get("EMO_OPS")
    if wanted is not None and wanted not in get_args(Backend):
        raise ValueError(f"EMO_OPS must be one of {get_args(Backend)}; got {wanted!r}")
    return wanted
