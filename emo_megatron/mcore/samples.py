"""Megatron's datasets, whose samples also tell their padding and, for routers alone, their documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

NUM_PADDING = "num_padding"
"""Key of a sample, and of a micro-batch with document boundaries: tokens of padding at the end, [mbs] int64."""

ROUTER_BOUNDS = "router_bounds"
"""Key of a sample, [S + 1] int32 from 0 to S and filled with S, and of a micro-batch, [D + 1] int64: boundaries of its
documents for the routers only."""


class _TellsPadding:
    """Of a GPTDataset: samples with boundaries also say how many tokens at their end are padding.

    Megatron counts those to the last document. Without Megatron's own boundaries they have ROUTER_BOUNDS.
    """

    _num_fetched = 0
    _lengths: tuple[int, ...] = ()

    def _query_document_sample_shuffle_indices(self, idx: int) -> Any:
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)  # type: ignore[misc]
        # Megatron changes the list
        self._num_fetched, self._lengths = sum(lengths), tuple(lengths)
        return text, documents, lengths

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)  # type: ignore[misc]
        num_tokens = len(sample["tokens"])
        num_real = 0 if idx is None else min(self._num_fetched, num_tokens)
        told: dict[str, Any] = {NUM_PADDING: num_tokens - num_real}
        config = self.config  # type: ignore[attr-defined]
        if getattr(config, "gives_router_bounds", False):
            # what Megatron makes of them: the last label's token left out, padding counted to the last document
            lengths = self._lengths[:-1] if self._lengths[-1] == 1 else self._lengths
            ends = torch.tensor(lengths[:-1], dtype=torch.int32).cumsum(0)
            bounds = torch.full((num_tokens + 1,), num_tokens, dtype=torch.int32)
            bounds[: 1 + len(ends)] = torch.cat([ends.new_zeros(1), ends])
            told[ROUTER_BOUNDS] = bounds
        return sample | told


@dataclass
class PoolDatasetConfig(GPTDatasetConfig):
    """Megatron's, and whether samples have boundaries for the routers only."""

    gives_router_bounds: bool = False


class PoolGPTDataset(_TellsPadding, GPTDataset):
    """Megatron's dataset, whose samples tell their padding."""


class PoolMockGPTDataset(_TellsPadding, MockGPTDataset):
    """Megatron's made-up dataset, whose samples tell their padding."""
