"""Files that appear whole or not at all, how to tell them apart, and what is said where the machine refuses one."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit of a file's size is reached, see ulimit -f",
    errno.EMFILE: "this process may not open more files, see ulimit -n",
}
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)
_IN_WORDS = re.compile(r"\((?:os error )?(\d+)\)")
"""How libraries in Rust and torch tell an error of the machine: its text, and then its number."""


def message_of(error: BaseException) -> str:
    """What a user is told of an error; of one that the machine raised, the file and then the reason."""
    if isinstance(error, MemoryError):
        return ": ".join(filter(None, ["there is not enough memory", str(error)]))
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    reason = str(error.strerror)
    if error.errno in _REASONS:
        reason = f"{_REASONS[error.errno]} ({reason})"
    name = error.filename if error.filename2 is None else error.filename2
    if name is None:
        return reason
    return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {reason}"


def one_line(error: BaseException) -> str:
    """The text of a library's error, which may repeat what a file holds."""
    return " ".join(str(error).split())


def write_any_name() -> None:
    """Let standard output and error write with escapes what their encoding lacks, where they would end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def to_output() -> Iterator[None]:
    """Print in this block; what standard output still holds after it is written.

    Raises:
        OSError: it cannot be written, and is dropped: Python would fail of it once more when it ends. Errors of files
            have their names, and those of other kinds are raised as they are.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_OUTPUT:
            raise
        name = "standard output"
        with contextlib.suppress(OSError):
            file = Path(f"/proc/self/fd/{sys.stdout.fileno()}").readlink()
            name += f", {file}" if file.is_absolute() else ""
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, name) from None


def machine_error(error: BaseException) -> OSError | None:
    """The operating system's error that `error` is or, as a library's own exception, tells of; None for others."""
    if isinstance(error, OSError):
        return None if error.errno is None else error
    if isinstance(error, ValueError):
        return None
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch's writer finds the file shorter than it must be after the write that failed
        return machine_error(error.__context__)
    for number in map(int, _IN_WORDS.findall(str(error))):
        if number and os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return None


@contextlib.contextmanager
def writing(path: Path, *, under: Path | None = None) -> Iterator[None]:
    """Write a file or a folder in this block; what the machine refuses names it.

    Args:
        path: what the user knows it by.
        under: the name that it has meanwhile; by default `path`.

    Raises:
        OSError: the disk is full, or another error of the machine that is not of another file. It names `path`.
        ValueError: a text has characters that UTF-8 does not.
    """
    place = (path if under is None else under).absolute()
    try:
        yield
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
    except Exception as error:
        refused = machine_error(error)
        if refused is None:
            raise
        names = [name for name in (refused.filename, refused.filename2) if isinstance(name, str)]
        is_of_this = any(Path(name).absolute().is_relative_to(place) for name in names)
        # what is read in the block is another file, and is told by its own name
        if names and not is_of_this:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextlib.contextmanager
def whole(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Give the name to write under; it becomes `path` by a rename when the block ends well, and is gone if it fails.

    Args:
        path: a file, replaced if it exists; or a folder, which must not exist. Missing parents are made, and are gone
            again if the block fails. The name that is given does not exist yet: write a file there, or make a folder.
        is_new: nothing is replaced, not a file either.
    """
    if is_new or path.is_dir():
        must_not_exist(path)
    unfinished = _unfinished(path)
    with gone_on_failure(unfinished), writing(path, under=unfinished):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(unfinished)
        yield unfinished
        unfinished.replace(path)


@contextlib.contextmanager
def gone_on_failure(*paths: Path) -> Iterator[None]:
    """If the block fails, remove these files and folders, and what it made of the folders above them, if empty."""
    above = (folder for path in paths for folder in path.absolute().parents)
    made = [folder for folder in dict.fromkeys(above) if not folder.exists()]
    try:
        yield
    except BaseException:
        # what failed is to be told, not that it cannot be removed either
        for path in paths:
            with contextlib.suppress(OSError):
                _remove(path)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def must_not_exist(path: Path) -> None:
    """Refuse to write over a file or a folder, or where none can be, before the work that makes another."""
    if path.is_symlink() or path.exists():
        raise ValueError(f"{path} exists; name one that does not, or remove it")
    must_be_writable(path)


def must_be_writable(path: Path) -> None:
    """Refuse a name whose folder, or the first one above it that exists, cannot be written to."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} cannot be written: a name has no NUL character")
    with writing(path, under=_unfinished(path)):
        # longer than the name itself
        _unfinished(path).exists()
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is no folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: this user may not write to {folder}; name another place")


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def say(text: str) -> None:
    """Print a command's result."""
    with to_output():
        print(text)
