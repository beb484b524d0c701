"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give the name to write under; it becomes `path` by a rename when the block ends well, and is gone if it fails.

    Args:
        path: a file, replaced if it exists; or a folder, which must not exist. Missing parents are made. The name that
            is given does not exist yet: write a file there, or make a folder.

    Raises:
        ValueError: `path` is a folder that exists.
    """
    if path.is_dir():
        raise ValueError(f"{path} exists; name a folder that does not, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    _remove(unfinished)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        _remove(unfinished)


def must_not_exist(path: Path) -> None:
    """Refuse to write over a file, before the work that makes it.

    Raises:
        ValueError: it exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists; name another file, or remove it")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
