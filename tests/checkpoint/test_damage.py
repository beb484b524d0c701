"""Which errors of a checkpoint's reader are its files' fault, and which are told as they are."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from emo_megatron.checkpoint.damage import damage_of

FOLDER = Path("checkpoint")


def wrapped(error):
    """As torch's loader hands on what a rank failed of."""
    return CheckpointException("load", {0: (error, None)})


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    "error", [EOFError(), pickle.UnpicklingError("cut\nhere"), RuntimeError("cut"), OSError("cut")]
)
def test_damage_names_its_file_and_keeps_its_cause(error, wrap):
    raised = wrap(error)
    with (
        pytest.raises(ValueError, match=r"^checkpoint is not whole: its file a is damaged \(") as told,
        damage_of(["a"], folder=FOLDER),
    ):
        raise raised
    assert told.value.__cause__ is raised
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: not enough memory"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_files_fault_is_told_as_it_is(error, wrap):
    with pytest.raises(type(error)) as told, damage_of(["a"], folder=FOLDER, is_unpickled=True):
        raise wrap(error)
    assert told.value is error


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
def test_want_of_memory_may_be_the_files_fault_or_the_machines(wrap):
    with pytest.raises(ValueError, match=r"checkpoint: its file a .*memory"), damage_of(["a"], folder=FOLDER):
        raise wrap(MemoryError())


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["bare", "wrapped"])
@pytest.mark.parametrize("error", [AttributeError("no X"), ImportError("no X"), TypeError("no X")])
def test_a_name_that_is_missing_is_another_megatrons_or_a_bug(error, wrap):
    with (
        pytest.raises(ValueError, match=r"written by a Megatron that has what this .*: no X$"),
        damage_of(["a"], folder=FOLDER, is_unpickled=True),
    ):
        raise wrap(error)
    # of tensors nothing is unpickled
    with pytest.raises(type(error)) as told, damage_of(["a"], folder=FOLDER):
        raise wrap(error)
    assert told.value is error


@pytest.mark.parametrize(
    ("names", "told"), [("ba", "one of its files a, b is"), ("edcba", "one of its files a, b, c and 2 more is")]
)
def test_three_names_are_enough(names, told):
    with pytest.raises(ValueError, match=told), damage_of([*names], folder=FOLDER):
        raise EOFError
