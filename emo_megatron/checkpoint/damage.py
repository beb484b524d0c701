"""What a damaged or foreign file of a checkpoint makes of its reader, told in one line with the file's name."""

from __future__ import annotations

import contextlib
import errno
import pickle
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

_DAMAGE = (
    *(ArithmeticError, AssertionError, EOFError, LookupError, OSError, RuntimeError, ValueError),
    *(pickle.UnpicklingError, struct.error),
)
"""What a file that was cut or overwritten makes of its reader."""
_FOREIGN = (AttributeError, ImportError, TypeError)
"""What unpickling makes of names that are not there."""
_NO_MEMORY = ("not enough memory", "out of memory")
"""In the texts of torch's allocators, whose errors are RuntimeErrors."""
_OF_THE_MACHINE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_MOST_NAMES = 3


@contextlib.contextmanager
def damage_of(files: Collection[str], *, folder: Path, is_unpickled: bool = False) -> Iterator[None]:
    """Read files of a checkpoint in this block.

    Args:
        files: names of those that are read.
        folder: of the checkpoint.
        is_unpickled: whether objects come from them, whose classes may be missing here.

    Raises:
        ValueError: one of them is damaged, or was written by another Megatron.
        BaseException: what is no file's fault, such as PermissionError, as it is.
    """
    try:
        yield
    except (CheckpointException, MemoryError, *_DAMAGE, *_FOREIGN) as error:
        cause = _cause(error)
        if isinstance(cause, MemoryError):
            raise ValueError(
                f"{folder}: {_named(files)} asks for more memory than there is; it is damaged, or this machine has "
                "too little"
            ) from error
        if is_unpickled and isinstance(cause, _FOREIGN):
            raise ValueError(
                f"{folder} was written by a Megatron that has what this one lacks, or {_named(files)} is damaged: "
                f"{_first_line(cause)}"
            ) from error
        if isinstance(cause, _DAMAGE) and not _is_of_the_machine(cause):
            raise ValueError(f"{folder} is not whole: {_named(files)} is damaged ({_first_line(cause)})") from error
        if cause is error:
            raise
        raise cause from error


def _cause(error: BaseException) -> BaseException:
    """The error itself, or the first that a CheckpointException holds: its own text is a traceback."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether reading a whole file would have failed, too."""
    if isinstance(error, OSError):
        return isinstance(error, PermissionError) or error.errno in _OF_THE_MACHINE
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _named(files: Collection[str]) -> str:
    """Three of the names at most."""
    names = sorted(files)
    if len(names) == 1:
        return f"its file {names[0]}"
    more = len(names) - _MOST_NAMES
    listed = ", ".join(names[:_MOST_NAMES])
    return f"one of its files {listed}{f' and {more} more' if more > 0 else ''}"
