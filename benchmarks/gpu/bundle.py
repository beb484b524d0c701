"""The output of a run: summary.md and results.tgz, complete after every step, with limited number and size of files."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

SUMMARY, ARCHIVE = "summary.md", "results.tgz"
OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "FAILED", "timed out", "not run"
MIB = 1 << 20
PAGE_BYTES = 24_000
"""Most of one page that the summary quotes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a step ended."""

    name: str
    status: str
    seconds: float = 0.0
    says: str = ""
    folder: Path | None = None
    """Its files, with the log beside; None if it did not run."""

    def __str__(self) -> str:
        says = self.says.replace("|", "/")[:200]
        return f"| {self.name} | {self.status} | {self.seconds:.0f} | {says} |"


@dataclass(kw_only=True)
class Bundle:
    """The two files.

    Args:
        output: folder they are written to.
        results: folder of the steps' folders, all of which goes into the archive.
        title, metadata: head of the summary.
        max_files: 1 leaves the archive out.
        max_bytes: of both files together.
    """

    output: Path
    results: Path
    title: str
    metadata: dict[str, str]
    max_files: int
    max_bytes: int
    rows: list[Row] = field(default_factory=list)

    def write(self) -> None:
        """Write both anew, each whole or not at all."""
        archive, dropped = b"", []
        if self.max_files > 1:
            archive, dropped = self._archive(self.max_bytes * 3 // 4)
        summary = self._summary(dropped, self.max_bytes // 4)
        if archive:
            _replace(self.output / ARCHIVE, archive)
        _replace(self.output / SUMMARY, summary)

    def _archive(self, most: int) -> tuple[bytes, list[Path]]:
        """The archive, and the largest files, which did not fit."""
        files = sorted(path for path in self.results.rglob("*") if path.is_file())
        by_size = sorted(files, key=lambda path: path.stat().st_size)
        dropped: list[Path] = []
        while True:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
                for path in files:
                    if path not in dropped:
                        tar.add(path, arcname=path.relative_to(self.results))
            if buffer.tell() <= most or not by_size:
                return buffer.getvalue(), dropped
            dropped.append(by_size.pop())

    def _summary(self, dropped: list[Path], most: int) -> bytes:
        parts = [f"# {self.title}\n"]
        parts += ["\n".join(f"- {name}: {value}" for name, value in self.metadata.items()) + "\n"]
        parts += ["| step | status | seconds | last line |\n| --- | --- | --: | --- |"]
        parts += ["\n".join(str(row) for row in self.rows) + "\n"]
        if self.max_files < 2:
            parts.append(f"There is no {ARCHIVE}: one file is allowed.\n")
        if dropped:
            names = ", ".join(
                f"{path.relative_to(self.results)} ({path.stat().st_size / MIB:.1f} MiB)" for path in dropped
            )
            limit = self.max_bytes / MIB
            parts.append(f"Left out of {ARCHIVE}, to keep within {limit:g} MiB: {names}.\n")
        size = sum(map(len, parts))
        left_out = []
        for row in self.rows:
            section = _section(row)
            if size + len(section.encode()) > most:
                left_out.append(row.name)
                continue
            size += len(section.encode())
            parts.append(section)
        if left_out:
            parts.append(f"Not quoted here for the limit on size: {', '.join(left_out)}.\n")
        return "\n".join(parts).encode()


def log_of(folder: Path) -> Path:
    """Where what a step prints goes: its own folder is empty when it begins."""
    return folder.with_name(f"{folder.name}.log")


def last_lines(log: Path, count: int) -> list[str]:
    """Of a log that may be long or not text."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 200 * count))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _section(row: Row) -> str:
    """A step's pages, or without any the end of its log."""
    if row.folder is None:
        return ""
    parts = [page.read_text(encoding="utf-8")[:PAGE_BYTES] for page in sorted(row.folder.glob("*.md"))]
    # below the summary's own headings
    parts = [re.sub(r"^#", "###", part, flags=re.MULTILINE) for part in parts]
    if row.status != OK or not parts:
        parts.append("\n".join(["```text", *last_lines(log_of(row.folder), 40), "```"]))
    body = "\n".join(parts)
    return f"## {row.name}\n\n{body}\n"


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
