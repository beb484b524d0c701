"""A cache of measurements. The key of an entry holds the weights, the documents, the settings and software versions.

A different question has a different key, so cached answers need no comparison with the options. An interrupted command
resumes from the cache, whatever its --output. Each entry is a separate file, written completely before it gets its
name; a damaged entry is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from emo_megatron import __version__
from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.select import select_top
from emo_megatron.experts.stats import ExpertStatistics, load_stats, merge_stats
from emo_megatron.json_files import from_json, to_json
from emo_megatron.runners.base import ExpertRunner, Loss

FOLDER = "EMO_MEGATRON_CACHE"
"""Environment variable: folder of the cache. Default: emo_megatron in XDG_CACHE_HOME or ~/.cache."""
LIMIT = "EMO_MEGATRON_CACHE_MB"
"""Environment variable: largest size of the cache in megabytes. The least recently used entries are deleted first."""
DEFAULT_MB = 2000.0
DOCUMENTS_AT_ONCE = 256
"""Number of documents between two saves of statistics."""


def open_cache() -> Cache:
    """The user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER) or f"{base}/emo_megatron"
    limit = os.environ.get(LIMIT) or str(DEFAULT_MB)
    try:
        megabytes = float(limit)
    except ValueError:
        megabytes = math.nan
    if not 0 <= megabytes < math.inf:
        raise ValueError(f"{LIMIT} must be a number of megabytes, 0 or more; got {limit}")
    # expanduser works for users without a home, where Path.expanduser raises
    return Cache(Path(os.path.expanduser(folder)), megabytes=megabytes)  # noqa: PTH111


class Cache:
    """Answers in files. Several processes may use one folder at the same time.

    If the folder cannot be written, the cache prints a warning and the measurement continues.

    Args:
        folder: folder of the files; created with the first entry.
        megabytes: largest size of all files together.
    """

    def __init__(self, folder: Path, *, megabytes: float = DEFAULT_MB) -> None:
        self._folder, self._limit = folder, megabytes * 1e6
        self._has_warned = False

    def get(self, question: dict[str, Any]) -> Any:
        """The stored answer to a question, or None."""
        path = self._path(question, "json")
        try:
            stored = from_json(path.read_bytes())
            if not isinstance(stored, dict) or stored["sha256"] != _digest(stored["answer"]):
                return None
        except (KeyError, OSError, ValueError):
            return None
        _touch(path)
        return stored["answer"]

    def put(self, question: dict[str, Any], answer: Any) -> None:
        """Store an answer, which must be a JSON value."""
        # the question is stored for people who read the file
        stored = to_json({"question": question, "answer": answer, "sha256": _digest(answer)}, indent=1)
        self._keep(self._path(question, "json"), lambda path: path.write_text(stored, encoding="utf-8"))

    def get_statistics(self, question: dict[str, Any]) -> ExpertStatistics | None:
        """The stored statistics, perhaps over the first documents only, or None."""
        digest, path = self.get(question), self._path(question, "safetensors")
        try:
            found = load_stats(path)
        except (OSError, ValueError):
            return None
        _touch(path)
        return found if found.digest() == digest else None

    def put_statistics(self, question: dict[str, Any], statistics: ExpertStatistics) -> None:
        """Store statistics and replace earlier ones."""
        self._keep(self._path(question, "safetensors"), statistics.save)
        self.put(question, statistics.digest())

    def _path(self, question: dict[str, Any], suffix: str) -> Path:
        return self._folder / f"{_digest(question)[:32]}.{suffix}"

    def _keep(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write an entry to a folder that no other process uses, and move the complete file to its place."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as own:
                unfinished = Path(own) / path.name
                write(unfinished)
                size = unfinished.stat().st_size
                if size <= self._limit:
                    self._make_room(size)
                    unfinished.replace(path)
        except OSError as error:
            if not self._has_warned:
                print(f"warning: measurements cannot be cached in {self._folder}: {error}", file=sys.stderr)
            self._has_warned = True

    def _make_room(self, size: int) -> None:
        """Delete the least recently used entries until there is room for a new entry."""
        states = []
        for path in self._folder.iterdir():
            # another process may delete the file in the meantime
            with contextlib.suppress(FileNotFoundError):
                states.append((path.stat(), path))
        files = sorted(
            (s.st_mtime_ns, s.st_size, path) for s, path in states if path.suffix in (".json", ".safetensors")
        )
        total = size + sum(size for _, size, _ in files)
        for _, size_of_file, path in files:
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size_of_file


class NoCache(Cache):
    """A cache that stores nothing."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))

    def get(self, question: dict[str, Any]) -> Any:
        """Return None."""

    def put(self, question: dict[str, Any], answer: Any) -> None:
        """Do nothing."""

    def put_statistics(self, question: dict[str, Any], statistics: ExpertStatistics) -> None:
        """Do nothing."""


def versions() -> dict[str, str]:
    """Versions of the software that measures."""
    found = {"emo_megatron": __version__}
    for name in ("megatron-core", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _touch(path: Path) -> None:
    """Note that an entry was used; errors are ignored, because a cache of another user may be read-only."""
    with contextlib.suppress(OSError):
        path.touch()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class CachedRunner:
    """A runner whose measurements are cached. All ranks must make the same calls; only the writer uses the cache.

    Args:
        model: runner that measures what is not in the cache.
        cache: the cache.
    """

    def __init__(self, model: ExpertRunner, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.metadata, self.setting, self.is_writer = model.metadata, model.setting, model.is_writer
        self.from_writer = model.from_writer
        self._setting = asdict(self.setting) | {"metadata": asdict(model.metadata), "versions": versions()}

    def loss(self, documents: Documents, *, allowed_LE: Tensor | None = None) -> Loss:
        """Mean loss on documents, see ExpertRunner."""

        def find() -> dict[str, Any]:
            return asdict(self.model.loss(documents.tokens, allowed_LE=allowed_LE))

        return Loss(**self.remember(self._question("loss", documents, allowed_LE), find))

    def kept_experts(self, documents: Documents, *, allowed_LE: Tensor, place: int, keep: int) -> list[int]:
        """The `keep` most probable experts, ascending, of the MoE layer at `place`, with only the allowed experts."""

        def find() -> list[int]:
            taken = self.model.statistics(documents.tokens, outputs=False, allowed_LE=allowed_LE)
            kept_E = select_top(taken.mean_probability_LE[place : place + 1], keep=keep)[0]
            return [int(expert) for expert in kept_E.nonzero().flatten()]

        question = self._question("likeliest experts", documents, allowed_LE) | {"place": place, "keep": keep}
        found: list[int] = self.remember(question, find)
        return found

    def statistics(self, documents: Documents, *, outputs: bool) -> ExpertStatistics:
        """Statistics of the experts on documents, see ExpertRunner; saved in steps, so an interrupted pass resumes."""
        question = self._question("statistics", documents, None) | {"outputs": outputs}
        total = self.from_writer(lambda: self.cache.get_statistics(question))
        done = 0 if total is None else total.num_documents
        with tqdm(
            total=len(documents.tokens),
            initial=done,
            desc="statistics",
            unit="document",
            disable=None if self.is_writer else True,
        ) as bar:
            while done < len(documents.tokens):
                chunk = documents.tokens[done : done + DOCUMENTS_AT_ONCE]
                part = self.model.statistics(chunk, outputs=outputs)
                total = part if total is None else merge_stats([total, part])
                done += len(chunk)
                bar.update(len(chunk))
                if self.is_writer:
                    self.cache.put_statistics(question, total)
        assert total is not None, "there is at least one document"
        return total.of(documents.source | asdict(self.setting))

    def remember(self, question: dict[str, Any], find: Callable[[], Any]) -> Any:
        """The cached answer to a question; otherwise the result of `find`, a JSON value other than None."""
        answer = self.from_writer(lambda: self.cache.get(question))
        if answer is None:
            answer = find()
            if self.is_writer:
                self.cache.put(question, answer)
        return answer

    def _question(self, measured: str, documents: Documents, allowed_LE: Tensor | None) -> dict[str, Any]:
        allowed = None if allowed_LE is None else [row.nonzero().flatten().tolist() for row in allowed_LE]
        return self._setting | {"measured": measured, "documents": documents.source["sha256"], "allowed": allowed}
