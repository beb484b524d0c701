"""Places where nothing can be written are refused before any work; what fails later names its file, and is gone."""

from __future__ import annotations

import errno
import os

import pytest

from emo_megatron.files import message_of, must_be_writable, must_not_exist, to_output, whole


@pytest.mark.parametrize("check", [must_be_writable, must_not_exist])
@pytest.mark.parametrize("below", ["out", "new/folder/out"])
def test_a_place_below_a_folder_is_taken_and_nothing_is_made(check, below, tmp_path, monkeypatch):
    check(tmp_path / below)
    monkeypatch.chdir(tmp_path)
    check(type(tmp_path)(below))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [must_be_writable, must_not_exist])
@pytest.mark.parametrize("kind", ["file", "dangling"])
@pytest.mark.parametrize("below", ["out", "new/folder/out"])
def test_a_place_below_what_is_no_folder_is_refused(check, kind, below, tmp_path):
    mine = tmp_path / "mine"
    if kind == "file":
        mine.write_text("mine")
    else:
        mine.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"out cannot be written: {mine} is not a folder; give another path"):
        check(mine / below)


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path or mode == os.R_OK)
    with pytest.raises(ValueError, match=f"this user may not write to {tmp_path}; give another path"):
        must_be_writable(tmp_path / "new" / "out")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full (No space left"),
        (OSError(errno.ENOSPC, "No space", "a"), "a: the disk is full (No space)"),
        (OSError(errno.EDQUOT, "Quota", "a"), "a: the disk quota is used up (Quota)"),
        (OSError(errno.EFBIG, "Too large", "a"), "a: the file size limit is reached"),
        (OSError(errno.EMFILE, "Too many", b"a"), "a: this process may not open more files"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "a: No such file"),
        (OSError(errno.EXDEV, "Cross-device", "a", None, "b"), "b: Cross-device"),
        (OSError(errno.EBADF, "Bad", 7), "7: Bad"),
        (FileNotFoundError("there is no cat"), "there is no cat"),
        (ValueError("no cat"), "no cat"),
        (AssertionError(), "AssertionError"),
        (MemoryError(), "there is not enough memory"),
        (MemoryError("for 9 cats"), "there is not enough memory: for 9 cats"),
    ],
)
def test_an_error_of_the_machine_is_told_with_its_file(error, told):
    assert message_of(error).startswith(told)


class RustError(Exception):
    """As safetensors' and tokenizers' are."""


FULL = OSError(errno.ENOSPC, "No space left on device")


def torch_error():
    try:
        raise FULL
    except OSError:
        try:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        except RuntimeError as error:
            return error


def write(target, raised, *, is_folder=False, before=lambda: None):
    """Half of a file, or of a folder, and then an error."""
    with whole(target) as unfinished:
        if is_folder:
            unfinished.mkdir()
        file = unfinished / "half" if is_folder else unfinished
        file.write_text("half")
        before()
        raise raised(unfinished)


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize(
    "raised",
    [
        lambda place: FULL,
        lambda place: OSError(errno.ENOSPC, "No space left on device", str(place)),
        lambda place: OSError(errno.EDQUOT, "Quota", str(place / "weights")),
        lambda place: OSError(errno.EDQUOT, "Quota", str(place.absolute()), None, "elsewhere"),
        lambda place: RustError("while serializing: I/O error: No space left on device (os error 28)"),
        lambda place: RuntimeError("unable to open file <a>: Too many open files (24)"),
        lambda place: torch_error(),
    ],
)
def test_what_the_machine_refuses_names_the_file_to_be(raised, is_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = type(tmp_path)("new") / "folder" / "out"
    with pytest.raises(OSError, match="out") as told:
        write(target, raised, is_folder=is_folder)
    assert told.value.filename == str(target)
    assert told.value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/input"),
        OSError(errno.ENOSPC, "No space left on device", "/other/disk"),
        OSError("no number"),
        RuntimeError("model has (28) layers"),
        ValueError("input is damaged (os error 28: No space left on device)"),
        RustError("unknown"),
        KeyError("a"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_of_another_file_or_no_fault_of_the_machine_stays(error, tmp_path):
    with pytest.raises(type(error)) as told:
        write(tmp_path / "new" / "out", lambda _: error)
    assert told.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_even_where_nothing_can_be_removed(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def protect():
        monkeypatch.setattr(type(tmp_path), "unlink", refuse)

    with pytest.raises(OSError, match="No space") as told:
        write(tmp_path / "out", lambda _: FULL, before=protect)
    assert told.value.errno == errno.ENOSPC


def test_folders_that_hold_something_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    target = tmp_path / "mine" / "new" / "out"
    with pytest.raises(KeyError):
        write(target, lambda _: KeyError(), before=lambda: (target.parent / "log").touch())
    assert [path.name for path in (tmp_path / "mine" / "new").iterdir()] == ["log"]


@pytest.mark.parametrize("check", [must_be_writable, must_not_exist])
def test_names_that_no_file_can_have_are_refused_before_work(check, tmp_path):
    with pytest.raises(ValueError, match="NUL"):
        check(tmp_path / "a\0b")
    # the name itself fits, and what it is written under does not
    for length in (250, 300):
        with pytest.raises(OSError, match="too long") as told:
            check(tmp_path / ("a" * length))
        assert told.value.filename == str(tmp_path / ("a" * length))


def test_a_link_to_nowhere_is_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists"):
        must_not_exist(tmp_path / "link")


def test_text_that_has_no_utf8_names_the_file(tmp_path):
    with (
        pytest.raises(ValueError, match=r"a\.md cannot be written: .*surrogates"),
        whole(tmp_path / "a.md") as unfinished,
    ):
        unfinished.write_text("na\udcefve", encoding="utf-8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("there is no cat"),
        OSError(errno.ENOSPC, "No space left on device", "file"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        KeyError("a"),
    ],
)
def test_no_other_error_is_told_of_standard_output(error):
    with pytest.raises(type(error)) as told, to_output():
        raise error
    assert told.value is error
