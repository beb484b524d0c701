"""The dispatch ops: where rows of tokens go, copies of rows and sums of copies. This file picks the backend.

Definitions and shapes are in ops/reference_dispatch.py; the compiled ops, from csrc/, give the same integers and the
same sums. Everything is deterministic and nothing waits for the device: sizes are arguments. Copies and sums are each
other's gradients. With one rank these are a permutation of tokens to experts and its inverse.
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
    """What this rank will send: [R + E] int64; see reference_dispatch.count_sends."""
    ops = _ops(_choose(backend, routing_map_TE))
    return ops.count_sends(routing_map_TE, num_ranks=num_ranks)


def plan_send(
    routing_map_TE: Tensor, *, num_ranks: int, num_rows: int, num_pairs: int, backend: Backend | None = None
) -> SendPlan:
    """Lay out rows and pairs; see reference_dispatch.plan_send."""
    ops = _ops(_choose(backend, routing_map_TE))
    return ops.plan_send(routing_map_TE, num_ranks=num_ranks, num_rows=num_rows, num_pairs=num_pairs)


def plan_receive(codes_P: Tensor, *, num_rows: int, num_experts: int, backend: Backend | None = None) -> ReceivePlan:
    """Put the pairs of received rows in the order of their experts; see reference_dispatch.plan_receive."""
    ops = _ops(_choose(backend, codes_P, num_experts=num_experts))
    return ops.plan_receive(codes_P, num_rows=num_rows, num_experts=num_experts)


def copy_rows(rows_NH: Tensor, *, fanout: Fanout, backend: Backend | None = None) -> Tensor:
    """[P, H]: every copy of every row. Differentiable: the gradients of a row's copies are summed."""
    return _CopyRows.apply(_choose(backend, rows_NH), rows_NH, *fanout)


def sum_rows(copies_PH: Tensor, *, fanout: Fanout, backend: Backend | None = None) -> Tensor:
    """[N, H]: the sum of every row's copies in their order, in float32 or better, rounded once; zero without any.

    Differentiable: every copy gets its row's gradient.
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
    """The backend asked for, or the best one for this tensor."""
    if backend is not None:
        return backend
    if tensor.dtype not in native.DISPATCH_DTYPES:
        return "reference"
    return best_backend(tensor.device.type, num_experts)


def _ops(backend: Backend) -> Any:
    return native.load_native() if backend == "native" else reference_dispatch
