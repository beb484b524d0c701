"""What a long choice of experts has found so far, kept in a file so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from emo_megatron.modules.files import whole
from emo_megatron.modules.study import StudiedModel

FORMAT = "emo_megatron.selecting.1"


class Remember(Protocol):
    """Gives what is known by a name, and finds out what is not."""

    def __call__[T](self, name: str, find: Callable[[], T]) -> T:
        """What `find` gives, or gave when this name was asked for before: anything that JSON keeps as it is."""
        ...


def anew[T](name: str, find: Callable[[], T]) -> T:
    """A `Remember` that knows nothing."""
    return find()


class Progress:
    """Findings in a file, each written when it is found. Every rank makes the same calls; the first reads and writes.

    Args:
        path: JSON file.
        model: the one that is asked.
        question: all that the findings depend on, by names for the user; any JSON.

    Raises:
        ValueError: the file holds findings of another question, or something else.
    """

    def __init__(self, path: Path, *, model: StudiedModel, question: dict[str, Any]) -> None:
        self._path, self._model, self._question = path, model, question
        self._found: dict[str, Any] = model.from_writer(self._read)

    def remember[T](self, name: str, find: Callable[[], T]) -> T:
        """See Remember."""
        if name not in self._found:
            self._found[name] = find()
            if self._model.is_writer:
                self._write()
        answer: T = self._found[name]
        return answer

    def _write(self) -> None:
        stored = {"format": FORMAT, "question": self._question, "found": self._found}
        with whole(self._path) as unfinished:
            unfinished.write_text(json.dumps(stored, indent=1), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            asked, found = dict(stored["question"]), dict(stored["found"])
            if stored["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._path} is not the progress of a select ({error}): remove it"
            ) from None
        names = asked.keys() | self._question.keys()
        others = sorted(name for name in names if asked.get(name) != self._question.get(name))
        if others:
            raise ValueError(
                f"{self._path} is the progress of another select, whose {', '.join(others)} differ: give the options "
                "of that one to finish it, another --output, or remove the file"
            )
        return found
