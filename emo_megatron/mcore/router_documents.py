"""Document boundaries for the routers only: every other part of the host sees a batch without packed sequences.

The host carries nothing for us then, so a micro-batch's boundaries are this process's current ones from before its
forward pass until the next. The pool layers that full recompute runs in backward belong to an earlier micro-batch: a
hook on the model's output, which autograd calls before anything of that backward, says to which.
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
    """The documents of one micro-batch, for one forward pass through one model (chunk) and its backward."""

    _scope: PoolScope | None = field(default=None, init=False, repr=False)
    _asked: Counter[tuple[int, bool]] = field(default_factory=Counter, init=False, repr=False)
    """(layer number, whether in backward) -> how often the layer has asked."""

    def scope_for(
        self, layer_number: int, *, hidden_shape: torch.Size, shard: Shard, pool: PoolConfig, num_recomputed: int = 1
    ) -> PoolScope:
        """The scope of this micro-batch, for a layer that starts its forward pass or repeats it in backward.

        Full recompute repeats it `num_recomputed` times; the rest is as make_scope takes it.
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
"""Whether in backward -> the documents of the micro-batch that is computed there."""


def current_documents() -> RouterDocuments | None:
    """The documents of the micro-batch that is being computed, or recomputed in backward; None: it has none."""
    return _CURRENT.get(is_in_backward())


def forget() -> None:
    """Forget the documents of every micro-batch, before training starts over in this process."""
    _CURRENT.clear()


def forward_with_documents(
    call: Callable[..., Any], documents: RouterDocuments | None, *args: Any, **kwargs: Any
) -> Any:
    """`call(*args, **kwargs)`, whose pool layers see these documents.

    They stay the current ones after it returns, because layers of a schedule plan run later.

    Args:
        call: the model, or another function that runs it once or plans to.
        documents: of this micro-batch, not used before; None where the host carries boundaries or there are none.
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
    """A micro-batch through this stage: its output, as Megatron's schedules send it; or the plan of the pass.

    Layers take a packed micro-batch as one sequence, [mbs * s, 1, h], s being this rank's part of a sample; schedules
    exchange [s, mbs, h]. The bytes are the same, so a stage changes the view at its edges, and shapes need not travel
    with the tensors, for which every stage would wait.

    Args:
        batch: tokens, position_ids, labels and loss_mask, each a tensor or None.
        documents: as forward_with_documents takes them.
        packed: the same for a host that carries boundaries.
        num_samples: of a packed micro-batch whose stages exchange samples; else 1.
        is_planned: plan the pass and don't run it, as expert-parallel overlap asks.
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
    # schedules free what they have sent, which they can't do with a view
    return make_viewless_tensor(inp=exchanged, requires_grad=exchanged.requires_grad, keep_graph=True)


BOTH = (
    "packed_seq_params must be None with --pool-documents routers, where attention does not keep to documents; drop "
    "it, or use --pool-documents attention"
)


def merged_bounds(bounds_BX: Tensor) -> Tensor:
    """Boundaries of the micro-batch, [D + 1] int64, from those of its samples; waits for a device tensor.

    Args:
        bounds_BX: [mbs, S + 1] int32 or int64, each row from 0 to S and filled with S.
    """
    length = bounds_BX.shape[1] - 1
    first_B1 = torch.arange(len(bounds_BX), device=bounds_BX.device)[:, None] * length
    starts_BX = bounds_BX[:, :-1].long() + first_B1
    starts_D = starts_BX[bounds_BX.diff() > 0]
    return torch.cat([starts_D, starts_D.new_full((1,), len(bounds_BX) * length)])
