"""Micro-batches of small samples whose documents are known, and what of one a rank's model takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from support.training import Case

SEQ = 32
VOCAB = 64
SLOT = 4
"""Documents lie in slots of a multiple of so many tokens, so that two context-parallel ranks can cut each."""
LENGTHS = (0, 1, 1, 2, 3, 5, 7, 9, 12)
"""Of documents that are packed without slots."""
MAX_DOCUMENTS = 24
"""More than such a sample has."""
TOKEN_KEYS = ("tokens", "labels", "loss_mask", "positions")


def sample(index: int, *, has_slots: bool) -> dict[str, Tensor]:
    """A packed sample; 16 tokens count in the loss.

    Args:
        index: of the sample in training.
        has_slots: put documents of any length, empty ones too, in padded slots; without, they lie side by side, single
            tokens among them, and some samples end with padding that is counted to the last document.

    Returns:
        tokens, labels, loss_mask and positions [SEQ], lengths and slots [D], num_padding [1].
    """
    generator = torch.Generator().manual_seed(1000 + index)
    lengths, slots = (_in_slots if has_slots else _side_by_side)(generator)
    num_padding = 0 if has_slots else min(index % 3, max(lengths[-1] - 1, 0))
    tokens = torch.randint(VOCAB, (SEQ,), generator=generator)
    starts = torch.tensor([0, *slots]).cumsum(0)
    is_real = torch.zeros(SEQ)
    for start, length in zip(starts.tolist(), lengths, strict=False):
        is_real[start : start + length] = 1
    is_real[SEQ - num_padding :] = 0
    real = is_real.nonzero().flatten()
    is_counted = torch.zeros(SEQ)
    is_counted[real[torch.randperm(len(real), generator=generator)[:16]]] = 1
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1),
        "loss_mask": is_counted,
        "positions": torch.arange(SEQ),
        "lengths": torch.tensor(lengths),
        "slots": torch.tensor(slots),
        "num_padding": torch.tensor([num_padding]),
    }


def _in_slots(generator: torch.Generator) -> tuple[list[int], list[int]]:
    slots: list[int] = []
    while sum(slots) < SEQ:
        room = (SEQ - sum(slots)) // SLOT
        slots.append(SLOT * int(torch.randint(0, min(room, 4) + 1, (), generator=generator)))
    lengths = [max(slot - int(torch.randint(0, 3, (), generator=generator)), 0) for slot in slots]
    return lengths, slots


def _side_by_side(generator: torch.Generator) -> tuple[list[int], list[int]]:
    lengths: list[int] = []
    while sum(lengths) < SEQ:
        length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
        lengths.append(min(length, SEQ - sum(lengths)))
    return lengths, lengths


def micro_batch(first: int, rows: int, *, has_slots: bool = True) -> dict[str, Any]:
    """`rows` consecutive samples as one packed stream, and the place of every token: sample * SEQ + position."""
    samples = [sample(first + row, has_slots=has_slots) for row in range(rows)]
    batch: dict[str, Any] = {key: torch.cat([s[key] for s in samples]) for key in TOKEN_KEYS}
    batch["places"] = torch.arange(first * SEQ, (first + rows) * SEQ)
    batch["num_padding"] = torch.cat([s["num_padding"] for s in samples])
    for key, source in (("cu", "lengths"), ("cu_padded", "slots")):
        sizes = torch.cat([torch.zeros(1, dtype=torch.long), *(s[source] for s in samples)])
        batch[key] = sizes.cumsum(0).int()
    return batch


def places_with_a_vote(case: Case, *, num_samples: int, depth: int = 0) -> set[int]:
    """Places of the first samples' tokens that have a token `depth` places later in their document."""
    is_packed = case.documents == "attention"
    # elsewhere the host trains across documents
    depth = depth if is_packed else 0
    places = set()
    for index in range(num_samples):
        found = sample(index, has_slots=case.has_slots)
        starts = torch.tensor([0, *found["slots"]]).cumsum(0)
        real_end = SEQ - int(found["num_padding"])
        lengths = found["lengths" if is_packed else "slots"]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=False):
            end = min(start + length, real_end) - depth
            places |= set(range(index * SEQ + start, index * SEQ + end))
    return places


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank's model takes of a micro-batch, its tokens [1, s] where they are packed and else [mbs, s]."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    loss_mask: Tensor
    places_T: Tensor
    """[T]: of each token that this rank's routers see; -1 for padding put in by the layout."""
    num_flat: int
    """Samples whose hidden states travel between stages as if they were not packed."""
    packed: Any = None
    documents: Any = None


def part_of(batch: dict[str, Any], case: Case) -> Part:
    """This rank's part, in the form that the case asks for."""
    if case.documents == "routers":
        return _of_rows(batch, case)
    return _of_slots(batch, case) if case.has_slots else _padded(batch, case)


def _of_slots(batch: dict[str, Any], case: Case) -> Part:
    from . import tiny

    held = _held(batch, case)[None]
    longest = int(batch["cu_padded"].diff().max())
    packed = tiny.packed(
        batch["cu"].tolist(),
        cu_seqlens_q_padded=batch["cu_padded"],
        cu_seqlens_kv_padded=batch["cu_padded"],
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=SEQ,
    )
    return _part(batch, held, case, num_flat=case.mbs, packed=packed)


def _of_rows(batch: dict[str, Any], case: Case) -> Part:
    """Samples that are not packed: context parallelism takes two chunks of each."""
    from megatron.core import parallel_state

    from emo_megatron.mcore.router_documents import RouterDocuments

    rows = torch.arange(len(batch["tokens"])).view(-1, SEQ)
    rank = parallel_state.get_context_parallel_rank()
    chunks = rows.chunk(2 * case.cp, dim=1)
    held = torch.cat([chunks[rank], chunks[2 * case.cp - 1 - rank]], dim=1)
    documents = RouterDocuments(
        cu_seqlens=batch["cu_padded"],
        tokens_per_sample=SEQ,
        num_padding_B=None if case.has_slots else batch["num_padding"],
    )
    return _part(batch, held, case, num_flat=1, documents=documents)


def _part(batch: dict[str, Any], held: Tensor, case: Case, **more: Any) -> Part:
    # the routers see tokens of [s, mbs, h]
    places_T = _sequence_part(batch["places"][held].T.flatten(), case)
    return Part(**{key: batch[key][held] for key in TOKEN_KEYS}, places_T=places_T, **more)


def _padded(batch: dict[str, Any], case: Case) -> Part:
    """Documents as pretrain_emo.py gives them: padded and cut one by one where there is context parallelism."""
    from megatron.core import parallel_state

    from emo_megatron.mcore import padding

    from . import tiny

    cu, num_padding_B = batch["cu"], batch["num_padding"]
    bounds = cu
    # 0 is what padding gets
    batch = {key: batch[key][None] for key in TOKEN_KEYS} | {"places": batch["places"][None] + 1}
    if case.cp > 1:
        multiple = padding.padding_multiple(cp_size=case.cp, tp_size=case.tp)
        bounds = padding.padded_bounds(cu, multiple=multiple)
        num_tokens = int(bounds[-1])
        if case.has_fixed_length:
            num_tokens = padding.longest_padded(
                case.mbs * SEQ, max_documents=case.mbs * MAX_DOCUMENTS, multiple=multiple
            )
            bounds = padding.padded_bounds(cu, multiple=multiple, num_tokens=num_tokens)
        batch = padding.cut_by_document(
            batch,
            (*TOKEN_KEYS, "places"),
            cu_seqlens=cu,
            bounds=bounds,
            num_tokens=num_tokens,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=case.cp,
        )
    packed = tiny.packed(bounds.tolist(), tokens_per_sample=SEQ if case.cp == 1 else None)
    packing = padding.Packing(
        cu_seqlens=packed.cu_seqlens_q if case.cp == 1 else cu,
        tokens_per_sample=SEQ,
        num_samples=case.mbs,
        num_padding_B=num_padding_B,
    )
    setattr(packed, padding.PACKING, packing)
    return Part(
        **{key: batch[key] for key in TOKEN_KEYS},
        places_T=_sequence_part(batch["places"][0] - 1, case),
        num_flat=case.mbs if case.cp == 1 else 1,
        packed=packed,
    )


def _held(batch: dict[str, Any], case: Case) -> Tensor:
    """What this context-parallel rank holds: two chunks of the stream or, by document, of every slot."""
    from megatron.core import parallel_state

    stream = torch.arange(len(batch["tokens"]))
    if case.cp == 1:
        return stream
    rank = parallel_state.get_context_parallel_rank()
    bounds = batch["cu_padded"].tolist() if case.cp_partition == "document" else [0, len(stream)]
    held = []
    for start, end in itertools.pairwise(bounds):
        pieces = stream[start:end].chunk(2 * case.cp) if end > start else ()
        held += [pieces[rank], pieces[2 * case.cp - 1 - rank]] if pieces else []
    return torch.cat(held)


def _sequence_part(values_T: Tensor, case: Case) -> Tensor:
    from megatron.core import parallel_state

    return values_T.chunk(case.tp)[parallel_state.get_tensor_model_parallel_rank()]
