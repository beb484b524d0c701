"""The text of fidelity.py: a corpus prepared in advance, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import find_demo  # noqa: F401

from demo.corpus import UNTRAINED_SPLITS, Corpus


def open_corpus(folder: Path) -> Corpus:
    """A corpus that `prepare_corpus` left: `make demo` has one in its output folder.

    Raises:
        ValueError: the folder is none.
    """
    try:
        manifest = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        corpus = Corpus(path=folder, manifest=manifest)
        missing = [str(path) for path in _files(corpus) if not path.is_file()]
        if not corpus.domains or corpus.train_tokens < 1:
            raise ValueError("its corpus.json names no text")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--corpus must be a prepared corpus, the folder corpus of a finished demo; {folder} is none: {error!r}"
        ) from None
    if missing:
        raise ValueError(f"--corpus {folder} is not whole; it lacks {', '.join(missing)}")
    return corpus


def hash_corpus(corpus: Corpus) -> str:
    """16 hex digits of all tokens, trained on and held out, as they lie in the files."""
    digest = hashlib.sha256()
    for path in _files(corpus):
        with path.open("rb") as file:
            part = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {part}\n".encode())
    return digest.hexdigest()[:16]


def _files(corpus: Corpus) -> list[Path]:
    """The files with tokens."""
    files = [corpus.path / split / f"{domain}.safetensors" for split in UNTRAINED_SPLITS for domain in corpus.domains]
    return [corpus.path / "train.bin", corpus.path / "train.idx", *files]
