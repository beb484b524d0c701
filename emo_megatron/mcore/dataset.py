"""Write and read documents of tokens in the format of Megatron's training data (an indexed dataset)."""

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
    # Megatron warns about every missing GPU library; writing tokens needs none of them
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, IndexedDataset, IndexedDatasetBuilder

HEADER = struct.Struct("<9sQBQQ")
"""Header of an index: magic bytes, version, code of the tokens' type, number of sequences, number of bounds."""
_INTEGERS = {kind.value for kind in DType if not kind.name.startswith("float")}


def write_indexed_dataset(prefix: Path, documents: Iterable[Sequence[int]], *, vocab_size: int) -> None:
    """Write `prefix`.bin and `prefix`.idx with one sequence per document, in the given order.

    Each file appears complete or not at all, and the index appears last. An interrupted call therefore never leaves an
    index without data.

    Args:
        prefix: path without the ending; a missing folder is created.
        documents: token ids in [0, vocab_size); each document includes its end-of-document id.
        vocab_size: determines the number of bytes per token on disk.
    """
    data, index = (Path(f"{prefix}.{ending}") for ending in ("bin", "idx"))
    # the inner file, the data, is renamed first
    with whole(index) as new_index, whole(data) as new_data:
        builder = IndexedDatasetBuilder(str(new_data), dtype=DType.optimal_dtype(vocab_size))
        with contextlib.closing(builder.data_file):
            for position, document in enumerate(documents):
                tokens = np.asarray(document, dtype=np.int64)
                if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= vocab_size:
                    raise ValueError(
                        f"every document must have tokens with ids in [0, {vocab_size}); document {position} has "
                        + (f"ids from {tokens.min()} to {tokens.max()}" if tokens.size else "no tokens")
                    )
                builder.add_document(tokens, [tokens.size])
            if len(builder.sequence_lengths) == 0:
                raise ValueError(f"the dataset {prefix} must have at least one document; got none")
            builder.finalize(str(new_index))
        # an older index belongs to other data
        index.unlink(missing_ok=True)


class IndexedDocuments(Sequence[Tensor]):
    """The documents of an indexed dataset, each [n] int64. Each access reads one document.

    Args:
        prefix: path without the ending.

    Raises:
        ValueError: the file is not an index, the index is damaged, or the data do not match the index.
    """

    def __init__(self, prefix: Path) -> None:
        _check_header(prefix)
        try:
            self._dataset = IndexedDataset(str(prefix))
        except (AssertionError, IndexError, ValueError) as error:
            raise _damaged(prefix, str(error) or "the numbers in the file contradict each other") from None
        _check_extent(prefix, self._dataset)

    def __len__(self) -> int:
        return len(self._dataset.document_indices) - 1

    def __getitem__(self, place: Any) -> Any:
        bounds = self._dataset.document_indices
        parts = [self._dataset.get(at) for at in range(bounds[place], bounds[place + 1])]
        tokens = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(tokens.astype(np.int64))


def _damaged(prefix: Path, reason: str) -> ValueError:
    return ValueError(f"{prefix}.idx is not the index of a dataset, or is damaged: {reason}")


def _check_header(prefix: Path) -> None:
    """Raise ValueError for files on which Megatron's reader would fail halfway or map memory beyond the file's end."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with index.open("rb") as file:
        start = file.read(HEADER.size)
    if start[: len(_INDEX_HEADER)] != _INDEX_HEADER:
        raise _damaged(prefix, f"the file begins with {start[: len(_INDEX_HEADER)]!r}")
    if len(start) < HEADER.size:
        raise _damaged(prefix, f"the file is truncated ({len(start)} bytes)")
    _, version, code, sequences, documents = HEADER.unpack(start)
    if version != 1 or code not in _INTEGERS:
        raise _damaged(prefix, f"version {version} with token type {code} is not supported")
    # the length and the position of each sequence, and one bound per document
    needed = HEADER.size + sequences * (4 + 8) + documents * 8
    if (size := index.stat().st_size) < needed:
        raise _damaged(prefix, f"the file is truncated ({size} bytes of {needed})")
    if sequences and data.stat().st_size == 0:
        raise ValueError(f"{data} is empty, but {index} lists {sequences} sequences")


def _check_extent(prefix: Path, dataset: IndexedDataset) -> None:
    """Raise ValueError if documents or sequences are not consecutive, or if the data do not have the index's size."""
    index = dataset.index
    bounds, lengths = index.document_indices, index.sequence_lengths.astype(np.int64)
    if bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise _damaged(prefix, "the documents are not consecutive")
    places = np.concatenate([[0], lengths.cumsum()]) * index.dtype_size
    if (lengths < 0).any() or (index.sequence_pointers != places[:-1]).any():
        raise _damaged(prefix, "the sequences are not consecutive")
    if (size := Path(f"{prefix}.bin").stat().st_size) != places[-1]:
        raise ValueError(
            f"{prefix}.bin has {size} bytes, but {prefix}.idx describes {places[-1]} bytes: one of the files is "
            "truncated or belongs to another dataset"
        )
