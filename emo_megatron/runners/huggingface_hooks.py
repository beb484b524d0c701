"""Watch one MoE block of transformers through hooks: scores, choice, what experts put out; and leave experts out of it.

Shapes: T tokens, E routed experts, K experts a token, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_megatron.experts.stats import LayerSums, change_of


class BlockObserver:
    """Watches one MoE block, and leaves experts out of it, until `remove()`.

    Args:
        block: with a router `gate` and `experts`.
        top_k: K.
        renormalises: whether a token's top-k probabilities are scaled to sum to 1.
        allowed_E: [E] bool, experts that may be used; None: all.
        outputs: whether to look at what the experts put out.
        is_summing: whether to sum anything.

    Attributes:
        sums: over the counted tokens.
        is_counted_T: tokens of the running forward pass that are no padding.
    """

    def __init__(
        self, block: Any, *, top_k: int, renormalises: bool, allowed_E: Tensor | None, outputs: bool, is_summing: bool
    ) -> None:
        weight = block.gate.weight
        self._block, self._top_k, self._renormalises = block, top_k, renormalises
        self._outputs = outputs
        self._allowed_E = None if allowed_E is None else allowed_E.to(weight.device)
        self.sums = LayerSums(weight.shape[0], outputs=outputs, device=weight.device)
        self.is_counted_T: Tensor | None = None
        self._scored: tuple[Tensor, Tensor, Tensor] | None = None
        self._handles = [block.gate.register_forward_hook(self._route)]
        if is_summing:
            self._handles.append(block.register_forward_hook(self._finished))

    def remove(self) -> None:
        """Stop watching, and give the experts back."""
        for handle in self._handles:
            handle.remove()

    def _route(self, gate: Any, inputs: Any, output: Any) -> Any:
        """Note the scores; where experts are left out, give the block what it would get without them."""
        # transformers 5 has routers that choose, and what some of its releases give as logits are probabilities;
        # before, a linear layer whose block chooses
        chooses = isinstance(output, tuple)
        logits_TE = torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight)
        allowed_TE = logits_TE
        if self._allowed_E is not None:
            allowed_TE = logits_TE.masked_fill(~self._allowed_E, float("-inf"))
        probs_TE = allowed_TE.float().softmax(dim=-1)
        weights_TK, experts_TK = probs_TE.topk(self._top_k, dim=-1)
        if self._renormalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK.to(logits_TE.dtype)
        self._scored = (logits_TE, weights_TK, experts_TK)
        if self._allowed_E is None:
            return None
        return (output[0], weights_TK, experts_TK) if chooses else allowed_TE.view_as(output)

    def _finished(self, block: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert self._scored is not None
        assert self.is_counted_T is not None
        logits_TE, weights_TK, experts_TK = self._scored
        norms_TE = change_T = None
        routing_map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        if self._outputs:
            input_TH = inputs[0].flatten(0, -2)
            output_TH = (output[0] if isinstance(output, tuple) else output).reshape(input_TH.shape)
            change_T = change_of(input_TH, output_TH)
            lengths_TK = self._lengths(input_TH, weights_TK, experts_TK)
            norms_TE = torch.zeros_like(logits_TE, dtype=torch.float32)
            norms_TE = norms_TE.scatter(1, experts_TK, lengths_TK)
        self.sums.add(
            probs_TE=logits_TE.float().softmax(dim=-1),
            routing_map_TE=routing_map_TE,
            is_counted_T=self.is_counted_T,
            norms_TE=norms_TE,
            change_T=change_T,
        )

    def _lengths(self, input_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """[T, K] float32, gate times length of each chosen expert's output; computes the experts once more."""
        experts = self._block.experts
        found = []
        for k in range(self._top_k):
            weights_T1, experts_T1 = weights_TK[:, k : k + 1], experts_TK[:, k : k + 1]
            if isinstance(experts, torch.nn.ModuleList):
                output_TH = torch.zeros_like(input_TH)
                for expert in set(experts_T1[:, 0].tolist()):
                    rows = (experts_T1[:, 0] == expert).nonzero()[:, 0]
                    output_TH[rows] = experts[expert](input_TH[rows]) * weights_T1[rows]
            else:
                # past the hooks, which are for the model's own pass
                output_TH = experts.forward(input_TH, experts_T1, weights_T1)
            found.append(output_TH.float().norm(dim=-1))
        return torch.stack(found, dim=1)
