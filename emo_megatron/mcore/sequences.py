"""Held-out documents packed into sequences the way Megatron's training dataset packs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Packed tokens of one domain, [1, b * s], with their documents."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    seq_length: int

    def documents(self) -> Any:
        """The boundaries as Megatron's PackedSeqParams, on the device Megatron computes on."""
        from megatron.core.packed_seq_params import PackedSeqParams

        longest = int(self.cu_seqlens.diff().max())
        bounds = self.cu_seqlens.cuda()
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            tokens_per_sample=self.seq_length,
        )


def packed_sequences(
    path: Path, *, num_tokens: int, seq_length: int, batch_size: int, eod_token: int
) -> Iterator[Sequence]:
    """The first `num_tokens` tokens of a domain's documents, packed as training packs them.

    Args:
        path: safetensors with "tokens" int32 [N] and "cu_seqlens" int32 [D + 1].
        num_tokens: rounded down to whole batches of batch_size * seq_length, at least one.
    """
    stored = load_file(path)
    stream, bounds = stored["tokens"].long(), stored["cu_seqlens"].long()
    size = batch_size * seq_length
    available = (stream.numel() - 1) // size
    if available == 0:
        raise ValueError(
            f"{path} holds {stream.numel()} tokens and one batch needs {size + 1}; "
            "give the domain more documents or lower --micro-batch-size"
        )
    for start in range(0, min(available, max(1, num_tokens // size)) * size, size):
        tokens, labels = stream[start : start + size], stream[start + 1 : start + size + 1]
        inside = bounds[(bounds > start) & (bounds < start + size)] - start
        samples = torch.arange(0, size + 1, seq_length)
        cu_seqlens = torch.cat([inside, samples]).unique()
        lengths = cu_seqlens.diff()
        positions = torch.arange(size) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
        yield Sequence(
            tokens=tokens[None],
            labels=labels[None],
            # what follows an end of document is another document: nothing to predict
            loss_mask=(tokens != eod_token).float()[None],
            position_ids=positions[None],
            cu_seqlens=cu_seqlens.int(),
            seq_length=seq_length,
        )
