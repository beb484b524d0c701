"""The document of every token of a micro-batch.

Shapes: B samples per micro-batch, S tokens per sample, T = B * S tokens in flat packed order (the tokens of sample 0,
then those of sample 1), D documents. A document never crosses the end of a sample. No function waits for the device
unless its docstring mentions it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from emo_megatron.sharding import divide_exactly


@dataclass(frozen=True, kw_only=True, eq=False)
class DocumentSegments:
    """The documents of one unsharded micro-batch; created by `from_cu_seqlens`."""

    document_ids_T: Tensor
    """[T] int64 in [-1, D): the document of each token, ascending in flat order; -1 is padding."""
    starts_D: Tensor
    """[D] int64 in [0, T]: flat index of each document's first token; arbitrary for an empty document."""
    tokens_per_sample: int
    """S, at least 1; flat index // S is the index of the sample in the micro-batch."""
    real_starts_D: Tensor | None = None
    """[D] int64: `starts_D` without the padding between documents; None: there is no such padding."""

    @property
    def num_tokens(self) -> int:
        """T, including padding; read from the shape."""
        return self.document_ids_T.shape[0]

    @property
    def num_documents(self) -> int:
        """D, including empty documents; read from the shape."""
        return self.starts_D.shape[0]

    @cached_property
    def rows_D(self) -> Tensor:
        """[D] int64 in [0, B): the sample that holds each document."""
        # an empty document may start at T, one past the last sample
        last_row = max(self.num_tokens // self.tokens_per_sample - 1, 0)
        return (self.starts_D // self.tokens_per_sample).clamp(max=last_row)

    @cached_property
    def offsets_D(self) -> Tensor:
        """[D] int64 in [0, S]: number of tokens in the sample before the document, without padding.

        Padding is left out because pool sizes are drawn from these offsets, and padding depends on the layout.
        """
        if self.real_starts_D is None:
            return self.starts_D - self.rows_D * self.tokens_per_sample
        first_D = torch.searchsorted(self.rows_D, self.rows_D)
        return self.real_starts_D - self.real_starts_D[first_D]

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_q: Tensor,
        *,
        num_tokens: int,
        tokens_per_sample: int | None = None,
        cu_seqlens_padded: Tensor | None = None,
        check: bool | None = None,
    ) -> DocumentSegments:
        """Read the document boundaries that attention uses: `PackedSeqParams.cu_seqlens_q` of the micro-batch.

        Document d is [cu[d], cu[d + 1]); tokens past the last entry are padding. With `cu_seqlens_padded`, document d
        occupies [padded[d], padded[d + 1]), of which the first cu[d + 1] - cu[d] tokens are real. A repeated value is
        an empty document, which keeps its id.

        Args:
            cu_seqlens_q: [D + 1] int32 or int64, starts at 0, never decreases, counts unsharded tokens.
            num_tokens: T, including padding.
            tokens_per_sample: S; None if the micro-batch is one sample.
            cu_seqlens_padded: [D + 1], same form as `cu_seqlens_q`.
            check: also validate the values, which waits for a device tensor. None: only if the tensor is on the host.
        """
        _check_offsets_form(cu_seqlens_q, padded=cu_seqlens_padded)
        if tokens_per_sample is None:
            tokens_per_sample = max(num_tokens, 1)
        remedy = "Pass the length of one sample, or None if the micro-batch is one sample."
        divide_exactly(num_tokens, tokens_per_sample, "num_tokens", "tokens_per_sample", remedy)
        cu = cu_seqlens_q.long()
        bounds = cu if cu_seqlens_padded is None else cu_seqlens_padded.long()
        if check or (check is None and cu.device.type == "cpu"):
            _check_offsets_values(cu.cpu(), bounds=bounds.cpu(), num_tokens=num_tokens)
            _check_samples(bounds.cpu(), tokens_per_sample=tokens_per_sample)

        index_T = torch.arange(num_tokens, device=cu.device)
        # number of documents that end at or before the token; right=True counts an end at the token itself
        num_documents = cu.shape[0] - 1
        owner_T = torch.searchsorted(bounds[1:], index_T, right=True)
        is_padding_T = owner_T == num_documents
        if cu_seqlens_padded is not None:
            safe_T = owner_T.clamp(max=num_documents - 1)
            is_padding_T |= index_T - bounds[safe_T] >= cu.diff()[safe_T]
        return cls(
            document_ids_T=owner_T.masked_fill(is_padding_T, -1),
            starts_D=bounds[:-1],
            tokens_per_sample=tokens_per_sample,
            real_starts_D=None if cu_seqlens_padded is None else cu[:-1],
        )

    def whole_samples(self) -> DocumentSegments:
        """Ignore the boundaries: one document per sample; padding stays padding (an ablation)."""
        index_T = torch.arange(self.num_tokens, device=self.document_ids_T.device)
        row_T = index_T // self.tokens_per_sample
        return DocumentSegments(
            document_ids_T=torch.where(self.document_ids_T < 0, -1, row_T),
            starts_D=index_T[:: self.tokens_per_sample],
            tokens_per_sample=self.tokens_per_sample,
        )

    def without_tails(self, num_padding_B: Tensor) -> DocumentSegments:
        """Mark padding at the end of samples, which counted as a part of documents, as padding.

        Args:
            num_padding_B: [B] int64, number of padding tokens at the end of each sample.
        """
        index_T = torch.arange(self.num_tokens, device=self.document_ids_T.device)
        row_T = index_T // self.tokens_per_sample
        left_T = (row_T + 1) * self.tokens_per_sample - index_T
        is_padding_T = left_T <= num_padding_B[row_T]
        return dataclasses.replace(self, document_ids_T=self.document_ids_T.masked_fill(is_padding_T, -1))

    def take(self, token_indices: Tensor) -> Tensor:
        """Document ids of the given tokens: int64, same shape as `token_indices` (int64 in [0, T))."""
        return self.document_ids_T[token_indices]


def _check_offsets_form(cu_seqlens: Tensor, *, padded: Tensor | None) -> None:
    """Check shapes and dtypes of cumulative lengths; never reads values."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens_q must be 1-D with at least two entries, [documents + 1]; got {list(cu_seqlens.shape)}. "
            "Remove any batch dimension; for one document pass [0, num_tokens]."
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens_q must be int32 or int64; got {cu_seqlens.dtype}. Convert it.")
    if padded is not None and (padded.shape, padded.dtype) != (cu_seqlens.shape, cu_seqlens.dtype):
        raise ValueError(
            f"cu_seqlens_padded must match cu_seqlens_q, {list(cu_seqlens.shape)} {cu_seqlens.dtype}; got "
            f"{list(padded.shape)} {padded.dtype}. Take both from the same PackedSeqParams."
        )


def _check_offsets_values(cu: Tensor, *, bounds: Tensor, num_tokens: int) -> None:
    """Check the values of cumulative lengths; host tensors."""
    for name, values in (("cu_seqlens_q", cu), ("cu_seqlens_padded", bounds)):
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0; got {int(values[0])}. Prepend 0.")
        if (at := _first(values.diff() < 0)) is not None:
            raise ValueError(
                f"{name} must never decrease; got {int(values[at])}, then {int(values[at + 1])} at "
                f"entry {at + 1}. Remove filler entries, or fill with the last value."
            )
        if values[-1] > num_tokens:
            raise ValueError(
                f"{name} must end at or before num_tokens = {num_tokens}; got {int(values[-1])}. "
                "Take the boundaries and num_tokens from the same unsharded micro-batch."
            )
    if (at := _first(bounds.diff() < cu.diff())) is not None:
        raise ValueError(
            f"cu_seqlens_padded must give each document at least its length in cu_seqlens_q; document {at} has "
            f"{int(cu.diff()[at])} tokens and room for {int(bounds.diff()[at])}. Check that the two are not swapped."
        )


def _check_samples(bounds: Tensor, *, tokens_per_sample: int) -> None:
    """Check that no document crosses the end of a sample; host tensor."""
    first, last = bounds[:-1], bounds[1:] - 1
    is_crossing = first // tokens_per_sample < last // tokens_per_sample
    if (at := _first(is_crossing)) is not None:
        raise ValueError(
            f"cu_seqlens must contain every multiple of tokens_per_sample = {tokens_per_sample}; "
            f"document {at} is [{int(first[at])}, {int(last[at]) + 1}). Split documents at sample boundaries, "
            "or pass tokens_per_sample=None if the micro-batch is one sample."
        )


def _first(is_wrong: Tensor) -> int | None:
    """Index of the first True of a host tensor."""
    found = is_wrong.nonzero()
    return int(found[0]) if len(found) else None
