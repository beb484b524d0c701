"""A prepared corpus on disk: its files, and the fingerprint of its tokens. corpus.py writes it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

UNTRAINED_SPLITS = ("calibration", "validation")
SPLITS = ("train", *UNTRAINED_SPLITS)
MANIFEST = "corpus.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A corpus on disk."""

    path: Path
    manifest: dict[str, Any]
    """The content of corpus.json."""

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in order of preference."""
        return list(self.manifest["domains"])

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split over all domains."""
        return sum(row["tokens"]["train"] for row in self.manifest["domains"].values())


def token_files(corpus: Corpus) -> list[Path]:
    """The files with tokens: those for training first."""
    files = [corpus.path / split / f"{domain}.safetensors" for split in UNTRAINED_SPLITS for domain in corpus.domains]
    return [corpus.path / "train.bin", corpus.path / "train.idx", *files]


def fingerprint(corpus: Corpus) -> str:
    """The SHA-256 of all tokens as 32-bit numbers, and of the boundaries of the untrained documents."""
    from megatron.core.datasets.indexed_dataset import DType

    data, _, *untrained = token_files(corpus)
    digest = hashlib.sha256()
    train = np.memmap(data, dtype=DType.optimal_dtype(corpus.manifest["vocab_size"]), mode="r")
    for start in range(0, len(train), 1 << 24):
        digest.update(train[start : start + (1 << 24)].astype(np.int32).tobytes())
    for path in untrained:
        tensors = load_file(path)
        for name in ("tokens", "cu_seqlens"):
            digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
