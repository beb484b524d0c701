"""Shared code of the steps of stage A: arguments, and inputs of the ops.

T tokens, E experts, K experts per token, D documents, R ranks, H hidden size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emo_megatron import ops
from emo_megatron.ops import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCORINGS: dict[str, dict[str, bool | str]] = {
    "softmax": {},
    "softmax of chosen": {"pre_softmax": False},
    "sigmoid": {"score_function": "sigmoid"},
}
DOCUMENT_TOKENS = 512


def parser(description: str | None, *, tokens: int | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments that all steps share."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="device of the ops")
    found.add_argument("--output", type=Path, default=Path(), help="folder for the output files")
    if tokens:
        about = "tokens per batch, default %(default)s"
        found.add_argument("--tokens", type=int, default=tokens, help=about)
    return found


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of the routing ops."""

    logits_TE: Tensor
    document_ids_T: Tensor
    """[T] int64, -1 padding."""
    sizes_D: Tensor
    """[D] int64 pool sizes in [K, E]."""
    top_k: int

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.sizes_D)

    def to(self, device: torch.device | str) -> Inputs:
        """The same elsewhere."""
        return Inputs(
            logits_TE=self.logits_TE.to(device),
            document_ids_T=self.document_ids_T.to(device),
            sizes_D=self.sizes_D.to(device),
            top_k=self.top_k,
        )


def make_inputs(
    *,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    document_tokens: int = DOCUMENT_TOKENS,
    num_rows: int = 1,
    padding: int = 0,
    seed: int = 0,
) -> Inputs:
    """Documents with a taste of their own for some experts, made on the device, one after the other.

    Args:
        num_tokens: T, a multiple of num_rows.
        num_experts: E.
        dtype: of the logits.
        device: of everything.
        document_tokens: of a document on average.
        num_rows: samples whose tokens take turns, as in a batch [sequence, row] without packing.
        padding: so many last tokens belong to no document.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    num_documents = max(num_tokens // document_tokens, num_rows)
    cuts = torch.randperm(num_tokens - 1, **options)[: num_documents - 1] + 1
    is_first_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    is_first_T[cuts] = 1
    ids_T = is_first_T.cumsum(0).view(num_rows, -1).t().reshape(-1).contiguous()
    taste_DE = torch.randn(num_documents, num_experts, **options)
    logits_TE = torch.randn(num_tokens, num_experts, **options) + taste_DE[ids_T]
    if padding:
        ids_T[-padding:] = -1
    top_k = min(8, num_experts // 2)
    sizes_D = torch.randint(top_k, num_experts + 1, (num_documents,), **options)
    return Inputs(logits_TE=logits_TE.to(dtype), document_ids_T=ids_T, sizes_D=sizes_D, top_k=top_k)


def scores_of(inputs: Inputs, backend: ops.Backend = "native") -> Tensor:
    """[D, E] int64."""
    scores_DE: Tensor = ops.document_scores(
        inputs.logits_TE, document_ids_T=inputs.document_ids_T, num_documents=inputs.num_documents, backend=backend
    )
    return scores_DE


def pools_of(inputs: Inputs, backend: ops.Backend = "native") -> Tensor:
    """[D, E] bool."""
    scores_DE = scores_of(inputs, backend)
    pool_DE: Tensor = ops.select_pool(scores_DE, pool_sizes_D=inputs.sizes_D, backend=backend)
    return pool_DE


def route(inputs: Inputs, pool_DE: Tensor, scoring: str = "softmax") -> ops.Routing:
    """The compiled op."""
    return ops.pool_topk(
        inputs.logits_TE,
        document_ids_T=inputs.document_ids_T,
        pool_DE=pool_DE,
        top_k=inputs.top_k,
        backend="native",
        **SCORINGS[scoring],
    )


def differentiable(routing: ops.Routing) -> tuple[Tensor, Tensor, Tensor]:
    """What gradients flow through."""
    return routing.probs_TE, routing.score_sums_E, routing.z_T


def outputs(routing: ops.Routing) -> Iterator[tuple[str, Tensor]]:
    """By name."""
    for name in ("probs_TE", "routing_map_TE", "tokens_per_expert_E", "score_sums_E", "z_T"):
        yield name, getattr(routing, name)


def gradient(inputs: Inputs, pool_DE: Tensor, scoring: str = "softmax") -> Tensor:
    """[T, E], of the logits, for gradients of probs, score_sums and z that are a fixed pattern."""
    leaf_TE = inputs.logits_TE.detach().requires_grad_()
    moved = Inputs(logits_TE=leaf_TE, document_ids_T=inputs.document_ids_T, sizes_D=inputs.sizes_D, top_k=inputs.top_k)
    found = differentiable(route(moved, pool_DE, scoring))
    (grad_TE,) = torch.autograd.grad(found, [leaf_TE], [upstream(x) for x in found])
    return grad_TE


def upstream(output_X: Tensor) -> Tensor:
    """Gradients of an output, the same on every device."""
    count = torch.arange(output_X.numel(), device=output_X.device)
    return ((count * 7 % 31 - 15) / 16).to(output_X.dtype).view(output_X.shape)


def random_map(num_tokens: int, num_experts: int, top_k: int, device: str, seed: int = 0) -> Tensor:
    """[T, E] bool, K experts a token."""
    generator = torch.Generator(device).manual_seed(seed)
    random_TE = torch.rand(num_tokens, num_experts, generator=generator, device=device)
    map_TE = torch.zeros_like(random_TE, dtype=torch.bool)
    return map_TE.scatter_(1, random_TE.topk(top_k).indices, True)


def use_library(path: Path | None) -> None:
    """Load this library for the package's own."""
    if path:
        native.LIBRARY = path
    native.load_native()
