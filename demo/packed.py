"""A prepared corpus as one file, small enough to bring to a machine without a network.

The file is a tar archive compressed with xz: packed.json with the size and hash of every file, then the files of the
corpus folder. `unpack` yields a folder with the same bytes, or raises an error.
"""

import contextlib
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from demo.corpus_files import MANIFEST, Corpus, fingerprint, token_files
from emo_megatron.files import whole

MIB = 1 << 20
FORMAT = "emo_megatron.packed_corpus.1"
LISTING = "packed.json"
MAX_LISTING = 1 << 20
"""Largest size of packed.json in bytes."""
MAX_DICTIONARY = 192 * MIB
"""Largest window of the compression. Unpacking needs this memory."""
CHUNK = 1 << 20


def pack(corpus: Corpus, path: Path) -> int:
    """Write a corpus to one file, unless the file contains this corpus; returns the size of the file in bytes.

    Equal corpora give equal files.
    """
    names = [MANIFEST, *_names(corpus)]
    files = {name: _describe(corpus.path / name) for name in names}
    listing = {"format": FORMAT, "files": files}
    if path.is_file() and _listing_of(path) == listing:
        return path.stat().st_size
    total = sum(stored["bytes"] for stored in files.values())
    with (
        whole(path) as unfinished,
        lzma.open(unfinished, "wb", filters=_filters(total)) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        tqdm(total=total, desc="packing", unit="B", unit_scale=True, disable=None) as bar,
    ):
        text = json.dumps(listing, indent=1).encode()
        archive.addfile(_entry(LISTING, len(text)), io.BytesIO(text))
        for name in names:
            with (corpus.path / name).open("rb") as file:
                entry = _entry(name, files[name]["bytes"])
                archive.addfile(entry, CallbackIOWrapper(bar.update, file, "read"))
    return path.stat().st_size


def unpack(path: Path, folder: Path) -> Corpus:
    """Unpack a corpus into a new folder.

    Raises:
        ValueError: the file is not a packed corpus, is damaged or is not complete. The folder is then not created.
    """
    with whole(folder) as unfinished, _reading(path):
        unfinished.mkdir()
        with lzma.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            files = dict(_read_listing(archive)["files"])
            # the archive's iterator would start again with the first file
            while (member := archive.next()) is not None:
                _write_member(archive, member, files, unfinished)
        if files:
            raise ValueError(f"it lacks {', '.join(files)}")
        manifest = json.loads((unfinished / MANIFEST).read_text(encoding="utf-8"))
        corpus = Corpus(path=unfinished, manifest=manifest)
        if fingerprint(corpus) != manifest["fingerprint"]:
            raise ValueError(f"its tokens do not have the fingerprint in {MANIFEST}")
    return Corpus(path=folder, manifest=manifest)


def _filters(num_bytes: int) -> list[dict[str, int]]:
    """Settings of xz for tokens of 16 bits: positions modulo 2 matter, positions modulo 4 do not."""
    window = min(MAX_DICTIONARY, -(-num_bytes // MIB) * MIB)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window, "lc": 3, "lp": 1, "pb": 1}]


def _names(corpus: Corpus) -> list[str]:
    """The files of a corpus after the manifest, in the order of the archive."""
    tokenizer = sorted(path for path in (corpus.path / "tokenizer").rglob("*") if path.is_file())
    return [path.relative_to(corpus.path).as_posix() for path in (*tokenizer, *token_files(corpus))]


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Context for reading a packed corpus: errors of the content name the file."""
    try:
        yield
    except (lzma.LZMAError, EOFError, tarfile.TarError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = "the file ends too early" if isinstance(error, EOFError) else str(error) or repr(error)
        raise ValueError(f"{path} is not a whole corpus packed by python -m demo.packages: {reason}") from None


def _read_listing(archive: tarfile.TarFile) -> dict[str, Any]:
    first = archive.next()
    if first is None or first.name != LISTING or first.size > MAX_LISTING:
        raise ValueError(f"its first file is not {LISTING}")
    file = archive.extractfile(first)
    listing = json.loads(file.read()) if file is not None else {}
    if not isinstance(listing, dict) or listing.get("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT}")
    return listing


def _listing_of(path: Path) -> dict[str, Any]:
    """The content of packed.json; empty if the file is not a packed corpus."""
    with (
        contextlib.suppress(ValueError),
        _reading(path),
        lzma.open(path) as stream,
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        return _read_listing(archive)
    return {}


def _write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, files: dict[str, Any], folder: Path) -> None:
    """Write one file, if it is listed and has the listed hash, and take it off the list."""
    name = PurePosixPath(member.name)
    if member.name not in files or name.is_absolute() or ".." in name.parts:
        raise ValueError(f"it contains the unknown file {member.name}")
    file = archive.extractfile(member) if member.isreg() else None
    if file is None:
        raise ValueError(f"its {member.name} is not a regular file")
    target, digest = folder / name, hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as output:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            output.write(chunk)
    if digest.hexdigest() != files.pop(member.name)["sha256"]:
        raise ValueError(f"its {member.name} is damaged")
