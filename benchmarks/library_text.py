"""Text of Python's standard library, which every machine with Python has, as packed micro-batches of bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from models import Batch

VOCAB = 256


def library_texts(*, shortest: int) -> list[bytes]:
    """The modules of the standard library and Python's help texts, in an order that no machine changes."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = [path.read_bytes() for path in modules]
    found += [topics[name].encode() for name in sorted(topics)]
    return [text for text in found if len(text) > shortest]


def packed_batches(texts: Sequence[bytes], *, rows: int, seq_length: int, seed: int) -> Iterator[Batch]:
    """Micro-batches for ever: rows of two documents, each a piece of one text."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    quarter = seq_length // 4
    while True:
        lengths, pieces = [], []
        for _ in range(rows):
            first = quarter + below(2 * quarter)
            lengths += [first, seq_length - first]
        for length in lengths:
            text = texts[below(len(texts))]
            start = below(len(text) - length)
            pieces.append(torch.tensor(list(text[start : start + length + 1])))
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        tokens = {
            "input_ids": torch.cat([piece[:-1] for piece in pieces])[None],
            "labels": torch.cat([piece[1:] for piece in pieces])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        yield Batch(tokens=tokens, bounds=bounds, longest=max(lengths), seq_length=seq_length)
