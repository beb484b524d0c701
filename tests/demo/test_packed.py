"""demo/packed.py: a corpus comes back from one file with the same bytes, or there is one clear error."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support import words

from demo import packed
from demo.corpus import CorpusConfig, prepare_corpus
from demo.corpus_files import Corpus, fingerprint
from demo.packed import pack, unpack


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    pytest.importorskip("megatron.core")
    texts = words.write_alphabets(tmp_path_factory.mktemp("texts"))
    config = CorpusConfig(corpus_dir=texts, min_documents=12, min_document_chars=50, vocab_size=400)
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), config)


@pytest.fixture(scope="module")
def file(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "corpus.tar.xz"
    size = pack(corpus, path)
    assert size == path.stat().st_size < 2 * corpus.train_tokens
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_corpus_comes_back_with_the_same_bytes(corpus: Corpus, file: Path, tmp_path: Path) -> None:
    found = unpack(file, tmp_path / "new" / "corpus")
    assert found == Corpus(path=tmp_path / "new" / "corpus", manifest=corpus.manifest)
    assert _files(found.path) == _files(corpus.path)
    assert fingerprint(found) == corpus.manifest["fingerprint"]


def test_equal_corpora_give_equal_files_and_are_packed_once(corpus: Corpus, file: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus.path, tmp_path / "copy")
    copy = Corpus(path=tmp_path / "copy", manifest=corpus.manifest)
    pack(copy, tmp_path / "copy.tar.xz")
    assert (tmp_path / "copy.tar.xz").read_bytes() == file.read_bytes()
    before = (tmp_path / "copy.tar.xz").stat().st_mtime_ns
    pack(copy, tmp_path / "copy.tar.xz")
    assert (tmp_path / "copy.tar.xz").stat().st_mtime_ns == before
    # another corpus, or what is no corpus, is replaced
    (tmp_path / "copy.tar.xz").write_bytes(b"something else")
    pack(copy, tmp_path / "copy.tar.xz")
    assert (tmp_path / "copy.tar.xz").read_bytes() == file.read_bytes()


def _write(path: Path, members: dict[str, bytes | None], *, listing: dict[str, Any] | None) -> None:
    with lzma.open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        if listing is not None:
            members = {packed.LISTING: json.dumps(listing).encode()} | members
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            if data is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            entry.size = len(data or b"")
            archive.addfile(entry, io.BytesIO(data or b""))


def _members(file: Path) -> tuple[dict[str, Any], dict[str, bytes | None]]:
    with tarfile.open(file, "r:xz") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    return json.loads(members.pop(packed.LISTING)), dict(members)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("cut", "ends too early"),
        ("flipped", ""),
        ("empty", ""),
        ("foreign", ""),
        ("other archive", "first file"),
        ("newer", "format must be"),
        ("no object", "format must be"),
        ("lacks a file", "lacks train.bin"),
        ("another hash", "train.bin is damaged"),
        ("unknown file", "unknown file more"),
        ("above", r"unknown file \.\./more"),
        ("link", "train.bin is not a regular file"),
        ("another fingerprint", "fingerprint"),
        ("no manifest", "domains"),
    ],
)
def test_damaged_files_are_one_error(file: Path, tmp_path: Path, damage: str, says: str) -> None:
    path, data = tmp_path / "given", file.read_bytes()
    listing, members = _members(file)
    if damage in ("cut", "flipped", "empty", "foreign"):
        flipped = bytes([data[len(data) // 2] ^ 1])
        half = data[: len(data) // 2]
        content = {"cut": half, "flipped": half + flipped + data[len(half) + 1 :], "empty": b"", "foreign": b"PK" * 99}
        path.write_bytes(content[damage])
    elif damage == "other archive":
        _write(path, members, listing=None)
    else:
        _change(damage, listing, members)
        _write(path, members, listing={"newer": listing | {"format": "2"}, "no object": []}.get(damage, listing))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=f"given is not a whole corpus packed by python -m demo.packages.*{says}") as e:
        unpack(path, tmp_path / "new")
    assert "\n" not in str(e.value)
    assert [found.name for found in tmp_path.iterdir()] == ["given"]


def _change(damage: str, listing: dict[str, Any], members: dict[str, bytes | None]) -> None:
    tokens = members["train.bin"]
    assert tokens is not None
    if damage == "lacks a file":
        del members["train.bin"]
    elif damage == "another hash":
        members["train.bin"] = tokens[:-2] + b"\1\0"
    elif damage == "unknown file":
        members["more"] = b""
    elif damage == "above":
        members["../more"] = b""
        listing["files"]["../more"] = {"bytes": 0, "sha256": packed.hashlib.sha256(b"").hexdigest()}
    elif damage == "link":
        members["train.bin"] = None
    elif damage == "another fingerprint":
        members["train.bin"] = tokens[2:] + tokens[:2]
        listing["files"]["train.bin"]["sha256"] = packed.hashlib.sha256(members["train.bin"] or b"").hexdigest()
    elif damage == "no manifest":
        members["corpus.json"] = b"{}"
        listing["files"]["corpus.json"]["sha256"] = packed.hashlib.sha256(b"{}").hexdigest()
