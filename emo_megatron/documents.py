"""Which document every token of a micro-batch belongs to.

Shapes: B samples of a micro-batch, S tokens per sample, T = B * S tokens in flat packed order
(sample 0's tokens, then sample 1's), D documents. A document never crosses a sample. Everything is
vectorised and, unless a docstring says otherwise, never waits for the device.
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
    """The documents of one whole micro-batch, before any rank takes its shard.

    Raises:
        ValueError: on construction, when shapes or dtypes are not the ones below.
    """

    document_ids_T: Tensor
    """[T] int64 in [-1, D): the document of each token, ascending in flat order; -1 is padding."""
    starts_D: Tensor
    """[D] int64 in [0, T]: flat index of each document's first token, anything for an empty one."""
    tokens_per_sample: int
    """S, at least 1; flat index // S is the row of the sample in the micro-batch."""
    real_starts_D: Tensor | None = None
    """[D] int64: `starts_D` if padding between documents took no place; None: there is none."""

    def __post_init__(self) -> None:
        for name in ("document_ids_T", "starts_D"):
            value = getattr(self, name)
            if value.dim() != 1 or value.dtype != torch.int64:
                raise ValueError(
                    f"{name} must be a 1-D int64 tensor; got {value.dim()}-D {value.dtype}. Build "
                    "segments with from_cu_seqlens, from_eod or from_position_ids."
                )
        _check_tokens_per_sample(self.tokens_per_sample, num_tokens=self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """T, padding included; from the shape."""
        return self.document_ids_T.shape[0]

    @property
    def num_documents(self) -> int:
        """D, empty documents included; from the shape."""
        return self.starts_D.shape[0]

    @cached_property
    def rows_D(self) -> Tensor:
        """[D] int64 in [0, B): the sample each document lies in."""
        # an empty document may start at T, one past the last sample
        last_row = max(self.num_tokens // self.tokens_per_sample - 1, 0)
        return (self.starts_D // self.tokens_per_sample).clamp(max=last_row)

    @cached_property
    def offsets_D(self) -> Tensor:
        """[D] int64 in [0, S]: tokens of the sample before the document, padding left out.

        Pool sizes are drawn from them, and how much padding lies between documents depends on the layout.
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
        """Read the boundaries attention uses: `PackedSeqParams.cu_seqlens_q` of the micro-batch.

        Document d is [cu[d], cu[d + 1]); tokens past the last entry are padding. With
        `cu_seqlens_padded` it occupies [padded[d], padded[d + 1]), of which the first
        cu[d + 1] - cu[d] tokens are real. Repeated values are empty documents; they keep their id.

        Args:
            cu_seqlens_q: [D + 1] int32 or int64, from 0, never decreasing, of unsharded tokens.
            num_tokens: T, padding included.
            tokens_per_sample: S; None when the micro-batch is one sample.
            cu_seqlens_padded: [D + 1], as `cu_seqlens_q`.
            check: look at the values too, which waits for a device tensor. None: only on the host.
                Shapes and dtypes are always checked.

        Raises:
            ValueError: the tensors are not as above or, if values are looked at, a document crosses
                a sample.
        """
        _check_offsets_form(cu_seqlens_q, padded=cu_seqlens_padded)
        if tokens_per_sample is None:
            tokens_per_sample = max(num_tokens, 1)
        _check_tokens_per_sample(tokens_per_sample, num_tokens=num_tokens)
        cu = cu_seqlens_q.long()
        bounds = cu if cu_seqlens_padded is None else cu_seqlens_padded.long()
        if check or (check is None and cu.device.type == "cpu"):
            _check_offsets_values(cu.cpu(), bounds=bounds.cpu(), num_tokens=num_tokens)
            _check_samples(bounds.cpu(), tokens_per_sample=tokens_per_sample)

        index_T = torch.arange(num_tokens, device=cu.device)
        # how many documents end before the token; right=True: an empty one that ends where it begins is none of them
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

    @classmethod
    def from_eod(
        cls,
        tokens_BS: Tensor,
        *,
        eod_token: int,
        eos_starts_document: bool = False,
        is_padding_BS: Tensor | None = None,
    ) -> DocumentSegments:
        """Read boundaries from the end-of-document tokens in the text.

        An end-of-document token is the last of its document, so of several in a row each is a
        document. Every sample starts a document. Waits for a device tensor once: D depends on it.

        Args:
            tokens_BS: [B, S] integer token ids of the unsharded micro-batch.
            eod_token: the id that ends a document.
            eos_starts_document: count that token to the document after it, as the paper's released
                router does (its attention does not).
            is_padding_BS: [B, S] bool, True = padding, which belongs to no document and bounds
                none: documents are those of the text without it.

        Raises:
            ValueError: a tensor is not as above.
        """
        is_eod_T = _flat_samples(tokens_BS, name="tokens_BS") == eod_token
        is_real_T = _is_real(tokens_BS, is_padding_BS)
        before_T = _previous_real(is_real_T)
        opens_T = is_eod_T if eos_starts_document else is_eod_T[before_T.clamp(min=0)]
        return cls._from_openings(opens_T, is_real_T, before_T, sample_length=tokens_BS.shape[1])

    @classmethod
    def from_position_ids(cls, position_ids_BS: Tensor, *, is_padding_BS: Tensor | None = None) -> DocumentSegments:
        """Read boundaries from position ids that restart with every document.

        A document opens where the position id is 0 or not one more than the one before, and with
        every sample. Waits for a device tensor once: D depends on it.

        Args:
            position_ids_BS: [B, S] integer position ids of the unsharded micro-batch.
            is_padding_BS: as in `from_eod`.

        Raises:
            ValueError: a tensor is not as above.
        """
        position_T = _flat_samples(position_ids_BS, name="position_ids_BS").long()
        is_real_T = _is_real(position_ids_BS, is_padding_BS)
        before_T = _previous_real(is_real_T)
        continues_T = position_T == position_T[before_T.clamp(min=0)] + 1
        opens_T = (position_T == 0) | ~continues_T
        length = position_ids_BS.shape[1]
        return cls._from_openings(opens_T, is_real_T, before_T, sample_length=length)

    @classmethod
    def _from_openings(
        cls, opens_T: Tensor, is_real_T: Tensor, before_T: Tensor, *, sample_length: int
    ) -> DocumentSegments:
        """Number the documents that open where `opens_T`, and at each sample's first real token."""
        length = max(sample_length, 1)
        index_T = torch.arange(opens_T.shape[0], device=opens_T.device)
        is_start_T = is_real_T & (opens_T | (before_T < index_T // length * length))
        return cls(
            document_ids_T=torch.where(is_real_T, is_start_T.cumsum(0) - 1, -1),
            starts_D=is_start_T.nonzero().squeeze(1),
            tokens_per_sample=length,
        )

    def whole_samples(self) -> DocumentSegments:
        """Forget the boundaries: one document per sample, padding stays padding (an ablation)."""
        index_T = torch.arange(self.num_tokens, device=self.document_ids_T.device)
        row_T = index_T // self.tokens_per_sample
        return DocumentSegments(
            document_ids_T=torch.where(self.document_ids_T < 0, -1, row_T),
            starts_D=index_T[:: self.tokens_per_sample],
            tokens_per_sample=self.tokens_per_sample,
        )

    def without_tails(self, num_padding_B: Tensor) -> DocumentSegments:
        """Take padding at the end of samples out of the documents that it was counted to.

        Args:
            num_padding_B: [B] int64, tokens of padding at the end of each sample.
        """
        index_T = torch.arange(self.num_tokens, device=self.document_ids_T.device)
        row_T = index_T // self.tokens_per_sample
        left_T = (row_T + 1) * self.tokens_per_sample - index_T
        is_padding_T = left_T <= num_padding_B[row_T]
        return dataclasses.replace(self, document_ids_T=self.document_ids_T.masked_fill(is_padding_T, -1))

    def take(self, token_indices: Tensor) -> Tensor:
        """The document ids of tokens: int64, in the shape of `token_indices` (int64 in [0, T))."""
        return self.document_ids_T[token_indices]


def _flat_samples(values_BS: Tensor, *, name: str) -> Tensor:
    """[T] view of a [B, S] integer tensor."""
    is_integer = not (values_BS.is_floating_point() or values_BS.dtype == torch.bool)
    if values_BS.dim() != 2 or not is_integer:
        raise ValueError(
            f"{name} must be a 2-D integer tensor [samples, tokens]; got {list(values_BS.shape)} "
            f"{values_BS.dtype}. Pass the whole micro-batch, before it is sharded."
        )
    return values_BS.reshape(-1)


def _is_real(values_BS: Tensor, is_padding_BS: Tensor | None) -> Tensor:
    """[T] bool, True = not padding."""
    if is_padding_BS is None:
        return torch.ones_like(values_BS, dtype=torch.bool).reshape(-1)
    if is_padding_BS.shape != values_BS.shape or is_padding_BS.dtype != torch.bool:
        raise ValueError(
            f"is_padding_BS must be bool {list(values_BS.shape)}, True = padding; got "
            f"{is_padding_BS.dtype} {list(is_padding_BS.shape)}. Compare tokens with the pad id."
        )
    return ~is_padding_BS.reshape(-1)


def _previous_real(is_real_T: Tensor) -> Tensor:
    """[T] int64: flat index of the nearest real token before each token, -1 if there is none."""
    index_T = torch.arange(is_real_T.shape[0], device=is_real_T.device)
    latest_T = torch.where(is_real_T, index_T, -1).cummax(0).values
    return torch.cat([latest_T.new_full((1,), -1), latest_T])[: index_T.shape[0]]


def _check_tokens_per_sample(tokens_per_sample: int, *, num_tokens: int) -> None:
    remedy = "Pass the length of one sample, or None if the micro-batch is one sample."
    divide_exactly(num_tokens, tokens_per_sample, "num_tokens", "tokens_per_sample", remedy)


def _check_offsets_form(cu_seqlens: Tensor, *, padded: Tensor | None) -> None:
    """What shapes and dtypes say about cumulative lengths; never looks at values."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens_q must be 1-D with at least two entries, [documents + 1]; got "
            f"{list(cu_seqlens.shape)}. Drop a batch dimension; one document is [0, num_tokens]."
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens_q must be int32 or int64; got {cu_seqlens.dtype}. Convert it.")
    if padded is not None and (padded.shape, padded.dtype) != (cu_seqlens.shape, cu_seqlens.dtype):
        raise ValueError(
            f"cu_seqlens_padded must match cu_seqlens_q, {list(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}; got {list(padded.shape)} {padded.dtype}. Take both from the same "
            "PackedSeqParams."
        )


def _check_offsets_values(cu: Tensor, *, bounds: Tensor, num_tokens: int) -> None:
    """What the values of cumulative lengths must satisfy; host tensors."""
    for name, values in (("cu_seqlens_q", cu), ("cu_seqlens_padded", bounds)):
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0; got {int(values[0])}. Prepend 0.")
        if (at := _first(values.diff() < 0)) is not None:
            raise ValueError(
                f"{name} must never decrease; got {int(values[at])}, then {int(values[at + 1])} at "
                f"entry {at + 1}. Strip filler entries, or fill with the last value."
            )
        if values[-1] > num_tokens:
            raise ValueError(
                f"{name} must end at or before num_tokens = {num_tokens}; got {int(values[-1])}. "
                "Take boundaries and token count from the same unsharded micro-batch."
            )
    if (at := _first(bounds.diff() < cu.diff())) is not None:
        raise ValueError(
            f"cu_seqlens_padded must give documents at least their real length; document {at} has "
            f"{int(cu.diff()[at])} tokens and room for {int(bounds.diff()[at])}. Swap the tensors?"
        )


def _check_samples(bounds: Tensor, *, tokens_per_sample: int) -> None:
    """No document may cross a sample; host tensor."""
    first, last = bounds[:-1], bounds[1:] - 1
    is_crossing = first // tokens_per_sample < last // tokens_per_sample
    if (at := _first(is_crossing)) is not None:
        raise ValueError(
            f"cu_seqlens must contain every multiple of tokens_per_sample = {tokens_per_sample}; "
            f"document {at} is [{int(first[at])}, {int(last[at]) + 1}). Cut documents at samples, "
            "or pass tokens_per_sample=None if the micro-batch is one sample."
        )


def _first(is_wrong: Tensor) -> int | None:
    """Index of the first True of a host tensor."""
    found = is_wrong.nonzero()
    return int(found[0]) if len(found) else None
