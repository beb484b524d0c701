"""emo_megatron.mcore.dataset: what is written is read back, and damage is told with its file."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ranks import Ranks

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]
# after the mark: version, type of tokens, counts of sequences and of bounds of documents
BOUNDS = 34 + 3 * (4 + 8)
DAMAGE: dict[str, tuple[Callable[[bytearray, bytearray], object], str]] = {
    "a pointer of git-lfs": (
        lambda idx, data: idx.__setitem__(slice(None), b"version https://git-lfs.github.com"),
        "idx",
    ),
    "empty": (lambda idx, data: idx.clear(), "idx"),
    "the mark alone": (lambda idx, data: idx.__delitem__(slice(9, None)), "idx"),
    "cut in its counts": (lambda idx, data: idx.__delitem__(slice(30, None)), "idx"),
    "cut in its bounds": (lambda idx, data: idx.__delitem__(slice(-8, None)), "idx"),
    "another version": (lambda idx, data: struct.pack_into("<Q", idx, 9, 2), "idx.*version 2"),
    "an unknown type": (lambda idx, data: struct.pack_into("<B", idx, 17, 99), "idx.*type 99"),
    "floats": (lambda idx, data: struct.pack_into("<B", idx, 17, 7), "idx.*type 7"),
    "wrong counts": (lambda idx, data: struct.pack_into("<Q", idx, 18, 2**60), "idx"),
    "fewer sequences": (lambda idx, data: struct.pack_into("<Q", idx, 18, 2), "idx"),
    "no bounds": (lambda idx, data: struct.pack_into("<Q", idx, 26, 0), "idx"),
    "bounds that fall": (lambda idx, data: struct.pack_into("<qq", idx, BOUNDS, 0, 3), "idx"),
    "bounds that start late": (lambda idx, data: struct.pack_into("<q", idx, BOUNDS, 1), "idx"),
    "a negative length": (lambda idx, data: struct.pack_into("<i", idx, 34, -1), "idx"),
    "a sequence elsewhere": (lambda idx, data: struct.pack_into("<q", idx, 46, 8), "idx"),
    "no data": (lambda idx, data: data.clear(), "bin"),
    "data cut short": (lambda idx, data: data.__delitem__(slice(-2, None)), "bin.*10 bytes.*12"),
    "other data": (lambda idx, data: data.extend(b"more"), "bin.*16 bytes.*12"),
}


def damaged(folder: str) -> dict[str, str]:
    """What is said of each damage; and what the whole dataset gives."""
    from emo_megatron.mcore.dataset import IndexedDocuments, write_indexed_dataset

    root = Path(folder)
    write_indexed_dataset(root / "good", DOCUMENTS, vocab_size=100)
    said = {"good": str([tokens.tolist() for tokens in IndexedDocuments(root / "good")])}
    for name, (damage, _) in DAMAGE.items():
        parts = [bytearray((root / f"good.{end}").read_bytes()) for end in ("idx", "bin")]
        damage(*parts)
        for end, content in zip(("idx", "bin"), parts, strict=True):
            (root / f"d.{end}").write_bytes(content)
        try:
            IndexedDocuments(root / "d")
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    shutil.rmtree(root)
    return said


def test_a_damaged_dataset_is_one_line_with_its_file(
    ranks: Callable[[int], Ranks], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:

    (said,) = ranks(1).run(damaged, folder=str(tmp_path / "data"))
    assert said["good"] == str(DOCUMENTS)
    for name, (_, what) in DAMAGE.items():
        assert re.search(rf"/d\.{what}", said[name]), (name, said[name])
        assert len(said[name].splitlines()) == 1, name
    assert "Traceback" not in capfd.readouterr().err
