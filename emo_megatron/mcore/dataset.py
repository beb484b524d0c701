"""Write token documents as the indexed dataset Megatron trains on, and read them."""

import contextlib
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emo_megatron.files import whole

with warnings.catch_warnings():
    # Megatron warns of each library for GPUs that is missing; writing tokens needs none of them
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset, IndexedDatasetBuilder

HEADER = struct.Struct("<9sQBQQ")
"""Of an index: mark, version, code of the tokens' type, sequences and bounds of documents."""
_INTEGERS = {kind.value for kind in DType if not kind.name.startswith("float")}


def write_indexed_dataset(prefix: Path, documents: Iterable[Sequence[int]], *, vocab_size: int) -> None:
    """Write `prefix`.bin and `prefix`.idx, one sequence a document, in the order given.

    Both files appear whole or not at all, the index last, so an interrupted call never leaves an index without its
    data.

    Args:
        prefix: path without ending; its folder is made if missing.
        documents: token ids in [0, vocab_size), each document with its end-of-document id.
        vocab_size: decides the width of a token on disk.
    """
    data, index = (Path(f"{prefix}.{ending}") for ending in ("bin", "idx"))
    # what is renamed first is the inner one
    with whole(index) as new_index, whole(data) as new_data:
        builder = IndexedDatasetBuilder(str(new_data), dtype=DType.optimal_dtype(vocab_size))
        with contextlib.closing(builder.data_file):
            for position, document in enumerate(documents):
                tokens = np.asarray(document, dtype=np.int64)
                if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocab_size:
                    raise ValueError(
                        f"every document must hold ids in [0, {vocab_size}); document {position} has "
                        + (f"{tokens.min()} to {tokens.max()}" if tokens.size else "no token")
                    )
                builder.add_document(tokens, [tokens.size])
            if len(builder.sequence_lengths) == 0:
                raise ValueError(f"nothing to write to {prefix}: there are no documents")
            builder.finalize(str(new_index))
        # an older one is of other data
        index.unlink(missing_ok=True)


class IndexedDocuments(Sequence[Tensor]):
    """The documents of an indexed dataset, [n] int64 each, read when they are asked for.

    Args:
        prefix: path without ending.

    Raises:
        ValueError: its index is none or damaged, or its data are not what the index says.
    """

    def __init__(self, prefix: Path) -> None:
        _check_header(prefix)
        try:
            self._dataset = IndexedDataset(str(prefix))
        except (AssertionError, IndexError, ValueError) as error:
            raise _damaged(prefix, str(error) or "its counts do not fit together") from None
        _check_extent(prefix, self._dataset)

    def __len__(self) -> int:
        return len(self._dataset.document_indices) - 1

    def __getitem__(self, place: Any) -> Any:
        bounds = self._dataset.document_indices
        parts = [self._dataset.get(at) for at in range(bounds[place], bounds[place + 1])]
        tokens = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(tokens.astype(np.int64))


def _damaged(prefix: Path, reason: str) -> ValueError:
    return ValueError(f"{prefix}.idx is no index of a dataset, or damaged: {reason}")


def _check_header(prefix: Path) -> None:
    """Refuse what Megatron's reader asserts, or maps beyond the end of the file, before it leaves half an object."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with index.open("rb") as file:
        start = file.read(HEADER.size)
    if start[: len(_INDEX_HEADER)] != _INDEX_HEADER:
        raise _damaged(prefix, f"it begins with {start[: len(_INDEX_HEADER)]!r}")
    if len(start) < HEADER.size:
        raise _damaged(prefix, f"it is cut short, {len(start)} bytes")
    _, version, code, sequences, documents = HEADER.unpack(start)
    if version != 1 or code not in _INTEGERS:
        raise _damaged(prefix, f"version {version}, tokens of type {code}")
    # a length and a place of each sequence, and a bound of each document
    needed = HEADER.size + sequences * (4 + 8) + documents * 8
    if (size := index.stat().st_size) < needed:
        raise _damaged(prefix, f"it is cut short, {size} bytes of {needed}")
    if sequences and data.stat().st_size == 0:
        raise ValueError(f"{data} is empty; {index} names {sequences} sequences in it")


def _check_extent(prefix: Path, dataset: IndexedDataset) -> None:
    """Refuse documents that are not in their place, and data that the index is not of."""
    index = dataset.index
    bounds, lengths = index.document_indices, index.sequence_lengths.astype(np.int64)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise _damaged(prefix, "its documents do not follow one another")
    places = np.concatenate([[0], lengths.cumsum()]) * index.dtype_size
    if (lengths < 0).any() or (index.sequence_pointers != places[:-1]).any():
        raise _damaged(prefix, "its sequences do not follow one another")
    if (size := Path(f"{prefix}.bin").stat().st_size) != places[-1]:
        raise ValueError(
            f"{prefix}.bin has {size} bytes and {prefix}.idx is of {places[-1]}: one of them is cut short, or of "
            "another dataset"
        )
