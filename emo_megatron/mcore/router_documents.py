"""Document boundaries for the routers only: every other part of the host sees a batch without packed sequences.

Here the host does not carry the boundaries through the model. Instead this process stores the current micro-batch's
boundaries, from the start of its forward pass until the next forward pass. In backward, full recompute runs pool layers
of an earlier micro-batch. A hook on the model's output sets that micro-batch's boundaries; autograd calls the hook
before all other parts of the backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model, make_viewless_tensor
from torch import Tensor

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.compat import is_in_backward
from emo_megatron.mcore.context import PoolScope, Shard, make_scope
from emo_megatron.mcore.padding import Packing


@dataclass(kw_only=True, eq=False)
class RouterDocuments(Packing):
    """The documents of one micro-batch, for one forward pass through one model chunk and the backward of that pass."""

    _scope: PoolScope | None = field(default=None, init=False, repr=False)
    _asked: Counter[tuple[int, bool]] = field(default_factory=Counter, init=False, repr=False)
    """(layer number, whether in backward) -> number of calls of `scope_for` by the layer."""

    def scope_for(
        self, layer_number: int, *, hidden_shape: torch.Size, shard: Shard, pool: PoolConfig, num_recomputed: int = 1
    ) -> PoolScope:
        """The scope of this micro-batch, for a layer that starts its forward pass, or repeats that pass in backward.

        Args:
            layer_number: the calling layer.
            hidden_shape, shard, pool: as in make_scope.
            num_recomputed: how often full recompute repeats the layer's forward pass.
        """
        asks = (layer_number, is_in_backward())
        self._asked[asks] += 1
        if self._asked[asks] > (num_recomputed if asks[1] else 1):
            raise ValueError(
                f"layer {layer_number} got the documents of an earlier micro-batch: with --pool-documents routers "
                "every forward pass must go through emo_megatron.mcore.router_documents.forward_with_documents"
            )
        if self._scope is None:
            self._scope = make_scope(self, hidden_shape=hidden_shape, shard=shard, pool=pool)
        return self._scope


_CURRENT: dict[bool, RouterDocuments | None] = {}
"""False: the documents of the micro-batch in forward. True: of the micro-batch in backward."""


def current_documents() -> RouterDocuments | None:
    """The documents of the micro-batch that is computed now, or recomputed in backward; None: no boundaries."""
    return _CURRENT.get(is_in_backward())


def forget() -> None:
    """Delete the documents of all micro-batches, before training starts again in this process."""
    _CURRENT.clear()


def forward_with_documents(
    call: Callable[..., Any], documents: RouterDocuments | None, *args: Any, **kwargs: Any
) -> Any:
    """Call `call(*args, **kwargs)`, so that the pool layers get these documents.

    The documents stay current after the call, because layers of a schedule plan run later.

    Args:
        call: the model, or another function that runs the model once or plans one run.
        documents: documents of this micro-batch, not used in an earlier call; None: the host carries the boundaries, or
            there are no boundaries.
    """
    if documents is not None and kwargs.get("packed_seq_params") is not None:
        raise ValueError(BOTH)
    _CURRENT[False] = documents
    output = call(*args, **kwargs)
    if documents is not None and isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda _: _CURRENT.update({True: documents}))
    return output


def forward_stage(
    model: Any,
    batch: Mapping[str, Any],
    documents: RouterDocuments | None,
    packed: PackedSeqParams | None,
    *,
    num_samples: int,
    is_planned: bool,
) -> Any:
    """Run a micro-batch through this pipeline stage, or plan that run.

    Layers take a packed micro-batch as one sequence, [mbs * s, 1, h], where s is this rank's part of a sample.
    Schedules exchange [s, mbs, h]. The bytes are equal, so a stage only changes the view of its input and output.
    Stages need not send shapes with the tensors, for which every stage would wait.

    Args:
        batch: tokens, position_ids, labels and loss_mask, each a tensor or None.
        documents: as in forward_with_documents.
        packed: the document boundaries, if the host carries boundaries; else None.
        num_samples: number of samples of a packed micro-batch whose stages exchange samples; else 1.
        is_planned: plan the run and do not execute it, as expert-parallel overlap requires.

    Returns:
        The stage's output in the shape that Megatron's schedules send, or the plan.
    """
    if num_samples > 1:
        decoder = get_attr_wrapped_model(model, "decoder")
        if decoder.input_tensor is not None:
            decoder.input_tensor = decoder.input_tensor.view(-1, 1, decoder.input_tensor.shape[-1])
    output = forward_with_documents(
        model.build_schedule_plan if is_planned else model,
        documents,
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed,
    )
    if is_planned or num_samples == 1 or get_attr_wrapped_model(model, "post_process"):
        return output
    exchanged = output.view(-1, num_samples, output.shape[-1])
    # schedules free the tensors that they have sent, which is impossible for a view
    return make_viewless_tensor(inp=exchanged, requires_grad=exchanged.requires_grad, keep_graph=True)


BOTH = (
    "packed_seq_params must be None with --pool-documents routers, where attention crosses documents; drop "
    "packed_seq_params, or use --pool-documents attention"
)


def merged_bounds(bounds_BX: Tensor) -> Tensor:
    """Boundaries of the micro-batch, [D + 1] int64, from the boundaries per sample; synchronises with the device.

    Args:
        bounds_BX: [mbs, S + 1] int32 or int64. Each row goes from 0 to S and is filled up with S.
    """
    length = bounds_BX.shape[1] - 1
    first_B1 = torch.arange(len(bounds_BX), device=bounds_BX.device)[:, None] * length
    starts_BX = bounds_BX[:, :-1].long() + first_B1
    starts_D = starts_BX[bounds_BX.diff() > 0]
    return torch.cat([starts_D, starts_D.new_full((1,), len(bounds_BX) * length)])
