"""Find the folder of a checkpoint that a run wrote, and report damaged files in the folder by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from emo_megatron.files import machine_error

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for a checkpoint of weights without a run: no optimizer, iteration 0."""


def tracked_folder(run: Path) -> Path | None:
    """The folder of the iteration that the tracker in a run's folder names, as in Megatron; None without a tracker."""
    tracker = run / TRACKER
    if not tracker.is_file():
        return None
    said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if said == RELEASE:
        return run / RELEASE
    # int() raises an error for thousands of digits
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise ValueError(
            f"{tracker} must hold the number of an iteration or {RELEASE!r}; got {said[:80]!r}: name the folder of an "
            "iteration, or correct this file"
        )
    return run / f"iter_{int(said):07d}"


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Read a file of a checkpoint in this block; ValueError with the file's name for a damaged or foreign file.

    An error of the machine, such as a file without read permission, is raised unchanged if the error names the file.
    """
    try:
        yield
    except (CheckpointException, Exception) as raised:
        # torch's loader wraps every error, and its message is a traceback
        error = next(iter(raised.failures.values()))[0] if isinstance(raised, CheckpointException) else raised
        # a damaged length requests more memory than any machine has: an error of the file, not of the machine
        if not isinstance(error, Exception) or machine_error(error) is not None:
            raise error from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file} is damaged, or another version of Megatron wrote the file: {reason}") from raised
