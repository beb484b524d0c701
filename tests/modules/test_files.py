"""Places where nothing can be written are refused before any work."""

from __future__ import annotations

import os

import pytest

from emo_megatron.modules.files import must_be_writable, must_not_exist


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
    with pytest.raises(ValueError, match=f"out cannot be written: {mine} is no folder; name"):
        check(mine / below)


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path or mode == os.R_OK)
    with pytest.raises(ValueError, match=f"this user may not write to {tmp_path}; name another"):
        must_be_writable(tmp_path / "new" / "out")
