"""Find real text of clearly different domains on this machine; nothing is downloaded.

Every source is a generator of documents. A source without files on this machine yields nothing.
Files are read lazily, in an order that depends on `rng` only. The order alternates between
programs, so any prefix of the documents is a fair sample.
"""

import ast
import codecs
import gzip
import os
import random
import re
import shutil
import struct
import subprocess
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from emo_megatron.json_files import read_object

SOURCES = "sources.json"
"""File next to the folders of domains: domain -> `source`, the packages that the text comes from."""
MAX_FILE_BYTES = 1_000_000
# documents taken from a file with many documents
MAX_PER_FILE = 12
# text that has no documents is grouped into documents of about this many characters
PIECE_CHARS = 2000
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "lib2to3"})
NO_TESTS = SKIPPED_FOLDERS | {"test", "tests", "idle_test", "testing"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Folders with text: the system, the standard library, and the folder that torch is installed in."""

    root: Path = Path("/")
    stdlib: Path = field(default_factory=lambda: Path(sysconfig.get_path("stdlib")))
    packages: Path = field(default_factory=lambda: Path(torch.__file__).parents[1])


class Source(NamedTuple):
    """One domain: `documents(machine, rng=...)` yields its documents, possibly with duplicates."""

    name: str
    description: str
    documents: Callable[..., Iterator[str]]


def spread[T](items: Iterable[tuple[str, T]], *, rng: random.Random) -> list[T]:
    """Shuffle (family, item) pairs, then take one item of every family in turn."""
    shuffled = list(items)
    rng.shuffle(shuffled)
    seen: Counter[str] = Counter()
    rounds = []
    for family, _ in shuffled:
        rounds.append(seen[family])
        seen[family] += 1
    return [shuffled[i][1] for i in sorted(range(len(shuffled)), key=rounds.__getitem__)]


def find_files(
    roots: Sequence[Path], suffixes: tuple[str, ...], *, rng: random.Random, skip: frozenset[str] = SKIPPED_FOLDERS
) -> Iterator[Path]:
    """Yield the regular files below each root in turn, spread over the entries of that root.

    A missing root is skipped, and so are folders named in `skip`.
    """
    for root in roots:
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skip)
            for path in (Path(folder, name) for name in sorted(names) if name.endswith(suffixes)):
                if path.is_file() and not path.is_symlink():
                    found.append((path.relative_to(root).parts[0], path))
        yield from spread(found, rng=rng)


def read_texts(paths: Iterable[Path], *, max_bytes: int = MAX_FILE_BYTES) -> Iterator[str]:
    """Yield the text of UTF-8 files, cut at `max_bytes`; files named .gz are decompressed."""
    for path in paths:
        text = None
        with suppress(OSError, EOFError, zlib.error, UnicodeDecodeError):
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                data = file.read(max_bytes)
            text = codecs.utf_8_decode(data, "strict", len(data) < max_bytes)[0]
        if text is not None:
            yield text


def group_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Join consecutive pieces of one or a few lines into documents of about PIECE_CHARS characters."""
    held: list[str] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= PIECE_CHARS:
            yield "\n".join(held)
            held = []
    yield "\n".join(held)


def split_long(text: str, *, max_chars: int) -> list[str]:
    """Cut a text into consecutive parts of at most `max_chars` characters, if possible at the ends of lines."""
    parts, start = [], 0
    while len(text) - start > max_chars:
        line_end = text.rfind("\n", start + max_chars // 2, start + max_chars)
        end = start + max_chars if line_end < 0 else line_end
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


SLASH_COMMENT = re.compile(r"^[ \t]*/\*[\s\S]*?\*/[ \t]*\n?|(?:^[ \t]*//.*(?:\n|\Z))+", re.M)
HASH_COMMENT = re.compile(r"(?:^[ \t]*#.*(?:\n|\Z))+", re.M)
LICENCE = re.compile(r"copyright|\(c\) ?\d|spdx-|licen[sc]e|permission to use|redistribut", re.I)


def strip_licences(text: str, *, comment: re.Pattern[str]) -> str:
    """Remove all comments that contain a licence or a copyright."""
    return comment.sub(lambda match: "" if LICENCE.search(match[0]) else match[0], text)


MACROS = re.compile(r"^[.'][ \t]*(de|ig|TS|EQ)\b[\s\S]*?^[.'][ \t]*(?:\.|TE|EN)[ \t]*$\n?", re.M)
ESCAPE = re.compile(r"\\(?:\((..)|\[([^]]*)]|[*fFmMn](?:\(..|\[[^]]*]|.)|s[-+]?\d+|\"[^\n]*|(.))")
GLYPHS = dict.fromkeys(("aq", "oq", "cq", "'"), "'") | dict.fromkeys(("dq", "lq", "rq"), '"')
GLYPHS |= dict.fromkeys(("em", "en", "mi", "-"), "-") | dict.fromkeys((" ", "~", "0"), " ")
GLYPHS |= dict.fromkeys(("rs", "e", "\\"), "\\")
GLYPHS |= {"ha": "^", "ti": "~", "ga": "`", "`": "`", "bu": "*", ".": "."}
ALTERNATING = frozenset({"BR", "RB", "BI", "IB", "IR", "RI", "SB"})
SPACED = frozenset({"SH", "SS", "B", "I", "SM", "IP", "TP", "HP", "UR", "MT", "TQ"})
BREAKS = frozenset({"SH", "SS", "PP", "P", "LP", "IP", "TP", "HP"})


def unroff(source: str) -> str:
    """Return the plain text of a man page in roff; empty if it does not use the man macros."""
    start = re.search(r"^\.[ \t]*TH\b.*$", source, re.M)
    if start is None:
        return ""
    lines = []
    for line in MACROS.sub("", source[start.end() :]).splitlines():
        if line[:1] not in (".", "'"):
            lines.append(line)
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"?|(\S+)', rest)]
        if macro in BREAKS:
            lines.append("")
        if macro in ALTERNATING:
            lines.append("".join(words))
        elif macro in SPACED:
            lines.append(" ".join(words[:1] if macro == "IP" else words))
    text = ESCAPE.sub(lambda m: GLYPHS.get(m[1] or m[2] or m[3] or "", ""), "\n".join(lines))
    return text.strip()


def _parse(paths: Iterable[Path]) -> Iterator[tuple[str, ast.Module]]:
    for text in read_texts(paths):
        tree = None
        with suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        if tree is not None:
            yield text, tree


def _definitions(paths: Iterable[Path], *, rng: random.Random) -> Iterator[str]:
    for text, tree in _parse(paths):
        lines = text.splitlines(keepends=True)
        nodes = [node for node in tree.body if isinstance(node, DEFINITIONS)]
        found = ["".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
        yield from _sample(found, rng=rng)


def _sample(documents: Iterable[str], *, rng: random.Random) -> list[str]:
    long = [document for document in documents if len(document) >= PIECE_CHARS // 4]
    return rng.sample(long, min(len(long), MAX_PER_FILE))


def python(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """Top-level functions and classes: the standard library first, then installed packages."""
    skip = NO_TESTS | {"idlelib", "pydoc_data", "encodings"}
    roots = [machine.stdlib, machine.packages]
    return _definitions(find_files(roots, (".py",), rng=rng, skip=skip), rng=rng)


def docstring(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """Long docstrings: English prose about interfaces."""
    roots = [machine.packages, machine.stdlib]
    for _, tree in _parse(find_files(roots, (".py",), rng=rng, skip=NO_TESTS)):
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, *DEFINITIONS))]
        yield from _sample((ast.get_docstring(node) or "" for node in nodes), rng=rng)


def c_header(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """C and C++ headers: first those of the system, then those of torch and Python."""
    include = machine.stdlib.parents[1] / "include"
    roots = [machine.root / "usr/include", machine.packages / "torch/include", include]
    paths = find_files(roots, (".h", ".hpp", ".cuh"), rng=rng, skip=frozenset({"ops"}))
    return (strip_licences(text, comment=SLASH_COMMENT) for text in read_texts(paths))


def javascript(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """JavaScript written by people: minified files, recognised by long lines, are left out."""
    folders = ("usr/lib/node_modules", "usr/share/nodejs", "usr/share/javascript")
    roots = [*(machine.root / folder for folder in folders), machine.packages]
    for text in read_texts(find_files(roots, (".js", ".mjs", ".cjs"), rng=rng)):
        if max(map(len, text.splitlines()), default=0) < 300:
            yield strip_licences(text, comment=SLASH_COMMENT)


def perl(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """Perl modules and scripts with their embedded documentation."""
    folders = [machine.root / "usr/share/perl", machine.root / "usr/share/perl5"]
    folders += sorted((machine.root / "usr/lib").glob("*/perl*"))
    paths = find_files(folders, (".pm", ".pl"), rng=rng, skip=frozenset({"unicore", "Unicode"}))
    return (strip_licences(text, comment=HASH_COMMENT) for text in read_texts(paths))


def man(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """English manual pages; all pages of one program's subcommands count as one family."""
    folders = [machine.root / "usr/share/man" / f"man{section}" for section in range(1, 9)]
    pages = [path for folder in folders for path in find_files([folder], ("",), rng=rng)]
    pages = spread(((re.split(r"[-_.:]", path.name)[0], path) for path in pages), rng=rng)
    return map(unroff, read_texts(pages))


PACKAGE_NOISE = re.compile(r"^(\S*[Ss]ize|Filename|MD5sum|SHA\d+|Description-md5): .*\n?", re.M)


def package(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """Records of the Debian package index, one per source package, without sizes and hashes."""
    command = shutil.which("apt-cache", path=machine.root / "usr/bin")
    if command is None:
        return
    output = subprocess.run([command, "dumpavail"], capture_output=True, check=False).stdout
    sources: dict[str, tuple[str, str]] = {}
    for record in output.decode(errors="replace").split("\n\n"):
        fields: dict[str, str] = dict(re.findall(r"^(Package|Source|Section): (\S+)", record, re.M))
        name = fields.get("Source") or fields.get("Package", "")
        sources.setdefault(name, (fields.get("Section", ""), record))
    yield from (PACKAGE_NOISE.sub("", record) for record in spread(sources.values(), rng=rng))


def changelog(machine: Machine, *, rng: random.Random) -> Iterator[str]:
    """Consecutive entries of Debian changelogs, one changelog per source package."""
    seen = set()
    endings = ("changelog.Debian.gz", "changelog.Debian")
    for text in read_texts(find_files([machine.root / "usr/share/doc"], endings, rng=rng)):
        name = text.partition(" ")[0]
        if name not in seen:
            seen.add(name)
            entries = re.split(r"\n(?=\S+ \([^)]+\) )", text)
            yield from _sample(group_pieces(entries), rng=rng)


def read_catalog(path: Path) -> Iterator[str]:
    """Yield the translations of 20 or more characters in a GNU message catalog (.mo)."""
    data = path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        return
    count, *tables = struct.unpack_from(f"{order}3I", data, 8)
    for index in range(count):
        spans = [struct.unpack_from(f"{order}2I", data, table + 8 * index) for table in tables]
        original, translation = (data[start : start + size] for size, start in spans)
        if original and translation != original and len(translation) >= 20:
            yield translation.decode().replace("\0", "\n")


def group_catalog(path: Path) -> list[str]:
    """Documents of consecutive translations in a GNU message catalog (.mo); none if the file is damaged."""
    with suppress(OSError, struct.error, UnicodeDecodeError):
        return list(group_pieces(read_catalog(path)))
    return []


def messages(machine: Machine, *, rng: random.Random, language: str) -> Iterator[str]:
    """Translated messages of programs; a document holds consecutive messages of one program."""
    documents: list[tuple[str, str]] = []
    folder = machine.root / "usr/share/locale" / language / "LC_MESSAGES"
    for path in find_files([folder], (".mo",), rng=rng):
        # the iso_* catalogs are lists of the names of countries and languages
        if not path.name.startswith("iso_"):
            documents += [(path.name, text) for text in group_catalog(path)]
    yield from spread(documents, rng=rng)


def folder_sources(corpus_dir: Path) -> tuple[Source, ...]:
    """One domain per folder in `corpus_dir`: every UTF-8 file below the folder is a document.

    If `corpus_dir` contains sources.json, written by packages.py, the descriptions are the packages listed there.
    """
    path = corpus_dir / SOURCES
    listed = read_object(path, kind="a list of sources") if path.is_file() else {}
    return tuple(
        Source(
            folder.name,
            listed.get(folder.name, {}).get("source", "files of the folder"),
            partial(_folder, folder=folder),
        )
        for folder in sorted(corpus_dir.glob("*/"))
    )


def _folder(machine: Machine, *, rng: random.Random, folder: Path) -> Iterator[str]:
    return read_texts(find_files([folder], ("",), rng=rng, skip=frozenset()))


MACHINE_SOURCES = (
    Source("python", "functions and classes of the standard library and packages", python),
    Source("c_header", "C and C++ headers", c_header),
    Source("man", "English manual pages", man),
    Source("package", "records of the Debian package index", package),
    Source("changelog", "Debian changelogs", changelog),
    Source("fr", "French messages of programs", partial(messages, language="fr")),
    Source("ru", "Russian messages of programs", partial(messages, language="ru")),
    Source("javascript", "JavaScript files", javascript),
    Source("perl", "Perl modules", perl),
    Source("docstring", "long docstrings of Python packages", docstring),
)
"""Every domain that may be found on this machine, in order of preference."""
