"""Files that appear whole or not at all, and how to tell them apart."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (".bin", ".distcp", ".safetensors")
"""What names of files with weights end in."""


@contextlib.contextmanager
def whole(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Give the name to write under; it becomes `path` by a rename when the block ends well, and is gone if it fails.

    Args:
        path: a file, replaced if it exists; or a folder, which must not exist. Missing parents are made. The name that
            is given does not exist yet: write a file there, or make a folder.
        is_new: nothing is replaced, not a file either.

    Raises:
        ValueError: `path` is a folder that exists, or is to be new and exists.
    """
    if is_new or path.is_dir():
        must_not_exist(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def mark_of(checkpoint: Path) -> str:
    """16 hex digits that change with the weights in a folder: of its place, and its files' names, sizes and times."""
    digest = hashlib.sha256(str(checkpoint.resolve()).encode())
    for path in sorted(checkpoint.iterdir()):
        if path.suffix in WEIGHTS:
            state = path.stat()
            digest.update(f"\n{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def must_not_exist(path: Path) -> None:
    """Refuse to write over a file or a folder, or where none can be, before the work that makes another.

    Raises:
        ValueError: it exists, or its folder can neither be made nor written to.
    """
    if path.exists():
        raise ValueError(f"{path} exists; name one that does not, or remove it")
    must_be_writable(path)


def must_be_writable(path: Path) -> None:
    """Refuse a name whose folder, or the first one above it that exists, cannot be written to.

    Raises:
        ValueError: it is a file, or may not be written to.
    """
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{path} cannot be written: this user may not write to {folder}; name another place"
        )


def partial_of(path: Path) -> Path:
    """Where what is known of a file so far is kept, beside it, until it is whole."""
    return path.with_name(f"{path.name}.partial")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
