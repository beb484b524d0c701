"""Atomic writes of files and folders, and messages for errors of the operating system."""

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
    errno.EFBIG: "the file size limit is reached, see ulimit -f",
    errno.EMFILE: "this process may not open more files, see ulimit -n",
}
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)
_IN_WORDS = re.compile(r"\((?:os error )?(\d+)\)")
"""Form of operating-system errors in messages of torch and of Rust libraries: text of the error, then errno."""


def message_of(error: BaseException) -> str:
    """Message of an error for users; for an error of the operating system, the file and then the reason."""
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
    """Text of a library's error as one line; the text may quote the content of a file."""
    return " ".join(str(error).split())


def write_any_name() -> None:
    """Make stdout and stderr escape characters that their encoding lacks; otherwise such characters end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def to_output() -> Iterator[None]:
    """Context for printing: flushes standard output at the end of the block.

    Raises:
        OSError: standard output cannot be written; the message names standard output. The buffered text is dropped, or
            Python would raise again at exit. Errors of files and errors of other kinds are raised unchanged.
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
    """The operating-system error that `error` is, or that it reports as a library's own exception; else None."""
    if isinstance(error, OSError):
        return None if error.errno is None else error
    if isinstance(error, ValueError):
        return None
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch's writer raises a second error, about the file's length, after the write that failed
        return machine_error(error.__context__)
    for number in map(int, _IN_WORDS.findall(str(error))):
        if number and os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return None


@contextlib.contextmanager
def writing(path: Path, *, under: Path | None = None) -> Iterator[None]:
    """Context for writing a file or a folder: errors of the operating system name `path`.

    Args:
        path: the name for messages.
        under: the temporary name during the write; by default `path`.

    Raises:
        OSError: the disk is full, or another error of the operating system, except errors of other files.
        ValueError: a text has characters that UTF-8 cannot encode.
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
        # an error of a file that is read in the block keeps the name of that file
        if names and not is_of_this:
            raise
        raise OSError(refused.errno, refused.strerror, str(path)) from error


@contextlib.contextmanager
def whole(path: Path, *, is_new: bool = False) -> Iterator[Path]:
    """Context for an atomic write: yields a temporary path, which is renamed to `path` if the block succeeds.

    If the block fails, the temporary path and the parent folders that were created are removed.

    Args:
        path: a file, which is replaced if it exists, or a folder, which must not exist. Missing parents are created.
            The yielded path does not exist yet: write a file there, or create a folder.
        is_new: raise an error if `path` exists, also for a file.
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
    """If the block fails, remove these files and folders, and the parents that the block created, if empty."""
    above = (folder for path in paths for folder in path.absolute().parents)
    made = [folder for folder in dict.fromkeys(above) if not folder.exists()]
    try:
        yield
    except BaseException:
        # errors of the removal are suppressed, so that the first error is reported
        for path in paths:
            with contextlib.suppress(OSError):
                _remove(path)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def must_not_exist(path: Path) -> None:
    """Raise a ValueError if `path` exists or cannot be written; called before the work that produces the file."""
    if path.is_symlink() or path.exists():
        raise ValueError(f"{path} exists; give another path, or remove it")
    must_be_writable(path)


def must_be_writable(path: Path) -> None:
    """Raise a ValueError if the nearest existing folder above `path` is not writable."""
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} cannot be written: a path must not contain a NUL character")
    with writing(path, under=_unfinished(path)):
        # the temporary name is longer than the name of `path`
        _unfinished(path).exists()
    folder = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: this user may not write to {folder}; give another path")


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
