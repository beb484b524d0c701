"""The experts of a layer as two grouped matrix products, for layers that Megatron would multiply expert by expert.

P rows (a token for each of its experts, sorted by expert), H width of the model, E experts, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SEQUENTIAL = "SequentialMLP"
GROUPED = "torch.nn.functional.grouped_mm"
TE_EXPERTS = "TEGroupedMLP"


class GroupedExperts(torch.nn.Module):
    """Megatron's SequentialMLP with SwiGLU and no biases: its weights, stacked, and its formula.

    Without Transformer Engine a layer of 128 experts is some thousand small launches, which a GPU waits for; these
    experts are few, so that what the router adds can be seen.
    """

    def __init__(self, sequential: Any) -> None:
        super().__init__()
        experts = sequential.local_experts
        self.fc1_EFH = torch.nn.Parameter(stacked([e.linear_fc1.weight for e in experts]))
        self.fc2_EHF = torch.nn.Parameter(stacked([e.linear_fc2.weight for e in experts]))

    def forward(self, rows_PH: Tensor, tokens_per_expert: Tensor, probs_P: Tensor) -> tuple[Tensor, None]:
        """Outputs [P, H], weighted; no bias."""
        grouped_mm = torch.nn.functional.grouped_mm
        ends_E = tokens_per_expert.cumsum(0).to(device=rows_PH.device, dtype=torch.int32)
        gate, up = grouped_mm(rows_PH, self.fc1_EFH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up * probs_P[:, None]
        return grouped_mm(hidden.to(rows_PH.dtype), self.fc2_EHF.transpose(1, 2), offs=ends_E), None


def stacked(weights: list[Tensor]) -> Tensor:
    """[E, ...] of E tensors, none of which wants a gradient of it."""
    return torch.stack([weight.detach() for weight in weights])
