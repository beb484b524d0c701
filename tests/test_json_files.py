"""JSON that people or other programs changed: every reader of a file refuses it in one line with its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emo_megatron.experts.placement import load_placement
from emo_megatron.experts.selection import load_selection
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.report.rows import load_rows

NOT_JSON = {
    "empty": b"",
    "blank": b" \n",
    "cut": b'{"format": "emo',
    "binary": bytes(range(256)),
    "not UTF-8": '{"method": "é"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not a number": b'{"loss": NaN}',
    "infinite": b"[-Infinity]",
    "too large": b"[1e999]",
    "too many digits": b"[" + b"9" * 5000 + b"]",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "twice": b'{"keep": 1, "keep": 2}',
}
OTHERS = ("null", "true", "1", '"text"', "[[]]", "[1]", '{"a": null}', '{"a": []}')


def hugging_face(path: Path) -> object:
    return HuggingFaceFolder(path.rename(path.with_name("config.json")).parent)


READERS = {
    "selection": load_selection,
    "placement": load_placement,
    "rows of the report": load_rows,
    "config": hugging_face,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("text", [*NOT_JSON.values(), *map(str.encode, OTHERS)])
def test_no_reader_takes_or_chokes_on_what_is_not_its_file(reader, text, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=r"(file|config)\.json") as told:
        READERS[reader](file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("reader", [load_selection, load_placement, load_rows])
def test_a_folder_and_a_missing_file_are_told_by_the_machine(reader, tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match=r"folder\.json"):
        reader(tmp_path / "folder.json")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        reader(tmp_path / "gone.json")


@pytest.mark.parametrize("reader", [load_selection, load_placement])
@pytest.mark.parametrize("version", ["0", "10"])
def test_another_version_is_told_from_another_file(reader, version, tmp_path):
    kind = reader.__name__.removeprefix("load_")
    for format, told in ((f"emo_megatron.{kind}.{version}", version), ("other.selection.1", "lacks")):
        (tmp_path / "a.json").write_text(json.dumps({"format": format, "new": 1}))
        with pytest.raises(ValueError, match=rf"a\.json.*{told}"):
            reader(tmp_path / "a.json")
