"""Write token documents as the indexed dataset Megatron trains on, and read them."""

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emo_megatron.modules.files import whole

with warnings.catch_warnings():
    # Megatron warns of each library for GPUs that is missing; writing tokens needs none of them
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
    )


def write_indexed_dataset(
    prefix: Path, documents: Iterable[Sequence[int]], *, vocab_size: int
) -> None:
    """Write `prefix`.bin and `prefix`.idx, one sequence a document, in the order given.

    Both files appear whole or not at all, the index last, so an interrupted call never leaves an index without its
    data.

    Args:
        prefix: path without ending; its folder is made if missing.
        documents: token ids in [0, vocab_size), each document with its end-of-document id.
        vocab_size: decides the width of a token on disk.

    Raises:
        OSError: the disk is full, or another error of the machine.
        ValueError: if a document is empty or holds an id outside [0, vocab_size), or there is none.
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
    """

    def __init__(self, prefix: Path) -> None:
        self._dataset = IndexedDataset(str(prefix))

    def __len__(self) -> int:
        return len(self._dataset.document_indices) - 1

    def __getitem__(self, place: Any) -> Any:
        bounds = self._dataset.document_indices
        parts = [self._dataset.get(at) for at in range(bounds[place], bounds[place + 1])]
        tokens = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(tokens.astype(np.int64))
