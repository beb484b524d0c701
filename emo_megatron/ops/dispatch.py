"""The dispatch ops: destinations of token rows, copies of rows and sums of copies. This file chooses the backend.

ops/reference_dispatch.py is the reference implementation and defines the shapes. The compiled ops, from csrc/, give
equal integers and sums. All ops are deterministic. No op waits for the device, because sizes are arguments. The
gradient of a copy is a sum, and the reverse. With one rank, the ops permute tokens to experts and back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emo_megatron.ops import Backend, best_backend, native, reference_dispatch
from emo_megatron.ops.reference_dispatch import Fanout, ReceivePlan, SendPlan

__all__ = ["Fanout", "ReceivePlan", "SendPlan", "copy_rows", "count_sends", "plan_receive", "plan_send", "sum_rows"]


def count_sends(routing_map_TE: Tensor, *, num_ranks: int, backend: Backend | None = None) -> Tensor:
    """Numbers of rows and pairs that this rank will send: [R + E] int64; see reference_dispatch.count_sends."""
    ops = _ops(_choose(backend, routing_map_TE))
    return ops.count_sends(routing_map_TE, num_ranks=num_ranks)


def plan_send(
    routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int, backend: Backend | None = None
) -> SendPlan:
    """Order the rows and pairs to send; see reference_dispatch.plan_send."""
    ops = _ops(_choose(backend, routing_map_TE))
    return ops.plan_send(routing_map_TE, num_ranks=num_ranks, num_rows=num_rows, num_pairs=num_pairs)


def plan_receive(codes_P: Tensor, *, num_rows: int, num_experts: int, backend: Backend | None = None) -> ReceivePlan:
    """Sort the pairs of received rows by expert; see reference_dispatch.plan_receive."""
    ops = _ops(_choose(backend, codes_P, num_experts=num_experts))
    return ops.plan_receive(codes_P, num_rows=num_rows, num_experts=num_experts)


def copy_rows(rows_NH: Tensor, *, fanout: Fanout, backend: Backend | None = None) -> Tensor:
    """Copy rows: [P, H]. Differentiable: the gradient of a row is the sum of its copies' gradients."""
    return _CopyRows.apply(_choose(backend, rows_NH), rows_NH, *fanout)


def sum_rows(copies_PH: Tensor, *, fanout: Fanout, backend: Backend | None = None) -> Tensor:
    """Sum each row's copies in order: [N, H], summed in float32 or better and rounded once; zero without copies.

    Differentiable: each copy gets the gradient of its row.
    """
    return _SumRows.apply(_choose(backend, copies_PH), copies_PH, *fanout)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, rows_NH: Tensor, *fanout: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*fanout)
        return _ops(backend).copy_rows(rows_NH, fanout=Fanout(*fanout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PH: Tensor) -> Any:
        gradient_NH = _ops(ctx.backend).sum_rows(gradient_PH, fanout=Fanout(*ctx.saved_tensors))
        return None, gradient_NH, None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, copies_PH: Tensor, *fanout: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*fanout)
        return _ops(backend).sum_rows(copies_PH, fanout=Fanout(*fanout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NH: Tensor) -> Any:
        gradient_PH = _ops(ctx.backend).copy_rows(gradient_NH, fanout=Fanout(*ctx.saved_tensors))
        return None, gradient_PH, None, None, None


def _choose(backend: Backend | None, tensor: Tensor, *, num_experts: int = 1) -> Backend:
    """The given backend; None: the best backend for this tensor."""
    if backend is not None:
        return backend
    if tensor.dtype not in native.DISPATCH_DTYPES:
        return "reference"
    return best_backend(tensor.device.type, num_experts)


def _ops(backend: Backend) -> Any:
    return native.load_native() if backend == "native" else reference_dispatch
