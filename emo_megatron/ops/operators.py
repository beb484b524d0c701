"""What torch must know of the compiled operators beside their kernels: the shapes they return, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_megatron.ops.reference import NUM_TOTALS
from emo_megatron.ops.reference_documents import NUM_STATISTICS


def register(namespace: str) -> None:
    """Register both for the operators of one loaded library."""
    _register_routing_shapes(namespace)
    _register_document_shapes(namespace)
    _register_dispatch_shapes(namespace)
    _register_gradients(namespace)


def _register_routing_shapes(namespace: str) -> None:
    """Tell torch what the operators return, for tracing."""

    @torch.library.register_fake(f"{namespace}::document_scores")
    def _(logits: Tensor, document_ids: Tensor, num_documents: int, scoring: int) -> Tensor:
        return logits.new_empty((num_documents, logits.shape[1]), dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::select_pool")
    def _(scores: Tensor, pool_sizes: Tensor, num_forced: int) -> Tensor:
        return torch.empty_like(scores, dtype=torch.bool)

    @torch.library.register_fake(f"{namespace}::pool_topk")
    def _(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        num_tokens, num_experts = logits.shape
        num_documents, by_document = rest[-2:]
        num_sums = num_documents if by_document else 1
        return (
            torch.empty_like(logits),
            torch.empty_like(logits, dtype=torch.bool),
            logits.new_empty(num_experts + NUM_TOTALS, dtype=torch.int64),
            logits.new_empty((num_sums, num_experts), dtype=torch.float32),
            logits.new_empty(num_tokens, dtype=torch.float32),
            logits.new_empty((num_documents, num_experts), dtype=torch.int64),
        )

    @torch.library.register_fake(f"{namespace}::pool_topk_backward")
    def _(
        grad_probs: Tensor | None, grad_score_sums: Tensor | None, grad_z: Tensor | None, logits: Tensor, *_rest: Any
    ) -> Tensor:
        return torch.empty_like(logits)


def _register_document_shapes(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::experts_used")
    def _(routing_map: Tensor, document_ids: Tensor, num_documents: int) -> Tensor:
        num_words = (routing_map.shape[1] + 31) // 32
        return routing_map.new_empty((num_documents, num_words), dtype=torch.int32)

    @torch.library.register_fake(f"{namespace}::document_statistics")
    def _(scores: Tensor | None, pool: Tensor | None, used: Tensor | None) -> Tensor:
        like = scores if scores is not None else used
        assert like is not None
        return like.new_empty(NUM_STATISTICS, dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::draw_bits")
    def _(
        positions: Tensor, offsets: Tensor, layers: Tensor | None, first_layer: int, num_layers: int, start: int
    ) -> Tensor:
        count = num_layers if layers is None else layers.shape[0]
        return positions.new_empty((count, positions.shape[0]))


# sizes as .shape: len() would compile anew for each
def _register_dispatch_shapes(namespace: str) -> None:
    def integers(like: Tensor, size: int) -> Tensor:
        return like.new_empty(size, dtype=torch.int64)

    @torch.library.register_fake(f"{namespace}::count_sends")
    def _(routing_map: Tensor, num_ranks: int) -> Tensor:
        return integers(routing_map, num_ranks + routing_map.shape[1])

    @torch.library.register_fake(f"{namespace}::plan_send")
    def _(routing_map: Tensor, num_ranks: int, num_rows: int, num_pairs: int) -> tuple[Tensor, ...]:
        sizes = (num_rows, num_rows, routing_map.shape[0] + 1, num_pairs)
        codes = routing_map.new_empty(num_pairs, dtype=torch.int32)
        return (*(integers(routing_map, size) for size in sizes), codes)

    @torch.library.register_fake(f"{namespace}::plan_receive")
    def _(codes: Tensor, num_rows: int, num_experts: int) -> tuple[Tensor, ...]:
        num_pairs = codes.shape[0]
        sizes = (num_pairs, num_pairs, num_rows + 1, num_pairs)
        return tuple(integers(codes, size) for size in sizes)

    @torch.library.register_fake(f"{namespace}::copy_rows")
    def _(rows: Tensor, sources: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        return rows.new_empty(sources.shape[0], rows.shape[1])

    @torch.library.register_fake(f"{namespace}::sum_rows")
    def _(copies: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        return copies.new_empty(bounds.shape[0] - 1, copies.shape[1])


def _register_gradients(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, document_ids, pool, _, *options = inputs
        # the groups are in the routing map
        ctx.options = (*options[:4], *options[6:])
        _, routing_map, counts, _, _, choices = output
        # of size [T, E] the logits and a byte an expert: backward computes the scores again
        ctx.save_for_backward(logits, routing_map, document_ids, pool)
        ctx.mark_non_differentiable(routing_map, counts, choices)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_probs, _, _, grad_score_sums, grad_z, _ = (None if grad is None else grad.contiguous() for grad in grads)
        logits, routing_map, document_ids, pool = ctx.saved_tensors
        grad_logits = ops.pool_topk_backward(
            grad_probs, grad_score_sums, grad_z, logits, routing_map, document_ids, pool, *ctx.options
        )
        return (grad_logits, *(None,) * 11)

    torch.library.register_autograd(f"{namespace}::pool_topk", backward, setup_context=setup_context)
