"""What a long choice of experts has found so far, kept in a file so that an interrupted one goes on where it was."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from emo_megatron.files import partial_of, whole
from emo_megatron.json_files import checked, read_own, to_json
from emo_megatron.runners.base import StudiedModel

FORMAT = "emo_megatron.selecting.1"


class Remember(Protocol):
    """Gives what is known by a name, and finds out what is not."""

    def __call__[T](self, name: str, find: Callable[[], T], *, is_right: Callable[[object], bool]) -> T:
        """What `find` gives, or gave when this name was asked for before: anything that JSON keeps as it is.

        Args:
            name: of what is asked.
            find: finds it out.
            is_right: whether what a file holds under this name can be what `find` gave.

        Raises:
            ValueError: it cannot.
        """
        ...


def anew[T](name: str, find: Callable[[], T], *, is_right: Callable[[object], bool]) -> T:
    """A `Remember` that knows nothing."""
    return find()


class Progress:
    """Findings in a file, each written when it is found. Every rank makes the same calls; the first reads and writes.

    The file tells the question from the start, so that nobody asks another one in the same place. As a context it is
    gone when the block ends well; when it fails, it stays if there is something to go on with.

    Args:
        output: what the findings are for; they are kept beside it.
        model: the one that is asked.
        question: all that the findings depend on, by names for the user; any JSON.

    Attributes:
        statistics: statistics file for statistics that belong to the findings.

    Raises:
        ValueError: the file holds findings of another question, or something else.
    """

    def __init__(self, output: Path, *, model: StudiedModel, question: dict[str, Any]) -> None:
        self._path, self._model, self._question = partial_of(output), model, question
        self.statistics = self._path.with_name(f"{self._path.name}.safetensors")
        self._found: dict[str, Any] = {}
        self._found = model.from_writer(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._model.is_writer:
            return
        if kind is None or not (self._found or self._measured):
            for path in (self._path, *self._measured):
                path.unlink(missing_ok=True)

    def remember[T](self, name: str, find: Callable[[], T], *, is_right: Callable[[object], bool]) -> T:
        """See Remember."""
        if name in self._found and not is_right(self._found[name]):
            told = reprlib.repr(self._found[name])
            raise ValueError(f"{self._path}: {name} cannot be {told}; remove the file")
        if name not in self._found:
            self._found[name] = find()
            if self._model.is_writer:
                self._write()
        answer: T = self._found[name]
        return answer

    @property
    def _measured(self) -> list[Path]:
        """Files of statistics, whole or not, that there are."""
        files = (self.statistics, partial_of(self.statistics))
        return [path for path in files if path.exists()]

    def _open(self) -> dict[str, Any]:
        if self._path.exists():
            return self._read()
        # the user removed the file that told what they are of
        for path in self._measured:
            path.unlink()
        self._write()
        return {}

    def _write(self) -> None:
        stored = {"format": FORMAT, "question": self._question, "found": self._found}
        with whole(self._path) as unfinished:
            unfinished.write_text(to_json(stored, indent=1), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        kinds = {"question": dict, "found": dict}
        try:
            stored = read_own(self._path, kind="the progress of a select", format=FORMAT, fields=kinds)
            checked(stored, kinds, where=str(self._path))
        except ValueError as error:
            raise ValueError(f"{error}; remove it") from None
        asked: dict[str, Any] = stored["question"]
        found: dict[str, Any] = stored["found"]
        names = asked.keys() | self._question.keys()
        others = sorted(name for name in names if asked.get(name) != self._question.get(name))
        if others:
            files = " and ".join(map(str, (self._path, *self._measured)))
            raise ValueError(
                f"{self._path} is the progress of another select, whose {', '.join(others)} differ: give the options "
                f"of that one to finish it, another --output, or remove {files}"
            )
        return found
