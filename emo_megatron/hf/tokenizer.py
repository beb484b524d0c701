"""The tokenizer of a model: read from a folder, checked against the vocabulary, saved with an export."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emo_megatron.json_files import is_a, read_object

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
GENERATION = "generation_config.json"
_JSON_FILES = (CONFIG, WHOLE, "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """A Hugging Face tokenizer from a folder. Nothing is downloaded, and no code in the folder is run.

    The folder holds tokenizer.json or the files of a tokenizer of transformers. ValueError names a damaged file.
    """

    def __init__(self, path: Path | str) -> None:
        from transformers import AutoTokenizer

        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise ValueError(
                f"{self.path} holds no tokenizer: name a folder with {CONFIG} by --tokenizer, such as a folder that "
                "save_pretrained wrote"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                # a path, never a name on the hub; without trust_remote_code transformers prompts on the terminal
                str(self.path.absolute()),
                local_files_only=True,
                trust_remote_code=False,
            )
            # some damage of a file shows only when the tokenizer is used
            self._tokenizer.encode("a", add_special_tokens=False)
        # a damaged file can cause any kind of error, including errors of the compiled library
        except Exception as error:
            raise ValueError(f"the tokenizer in {_damaged_file(self.path)} cannot be read: {reason(error)}") from None
        if absent := self._absent_files():
            raise ValueError(
                f"the tokenizer in {self.path} is not whole: the folder must hold {' and '.join(absent)}, or {WHOLE}"
            )

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def rows(self) -> int:
        """Number of rows that an embedding needs; more than the number of tokens if ids have gaps."""
        return 1 + max(self._tokenizer.get_vocab().values(), default=-1)

    def _absent_files(self) -> list[str]:
        """Missing vocabulary files; transformers replaces a missing file by an empty vocabulary."""
        names = getattr(self._tokenizer, "vocab_files_names", {})
        needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
        # tokenizer.json contains everything
        if not needed or (self.path / WHOLE).is_file():
            return []
        return [name for name in needed if not (self.path / name).is_file()]

    @property
    def ids(self) -> dict[str, int | None]:
        """Ids of the special tokens, with the names of config.json."""
        kinds = ("bos", "eos", "pad")
        return {f"{k}_token_id": getattr(self._tokenizer, f"{k}_token_id") for k in kinds}

    @property
    def end(self) -> int | None:
        """Id of the end-of-document token; None if the tokenizer has none: documents then end without a token."""
        return self.ids["eos_token_id"]

    @property
    def definition(self) -> dict[str, Any] | None:
        """The content of tokenizer.json; None for a tokenizer that exists only as Python code."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else json.loads(backend.to_str())

    @property
    def adds(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer itself puts before and after a text."""
        whole: list[int] = self._tokenizer.encode("a")
        text: list[int] = self._tokenizer.encode("a", add_special_tokens=False)
        start = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
        return whole[:start], whole[start + len(text) :]

    def generation(self, *, vocab_size: int | None = None) -> Mapping[str, Any]:
        """The settings in GENERATION beside the tokenizer, or else the ids at which generation ends.

        ValueError for a damaged file and, if `vocab_size` is given, for a token id (int, list or null in a field whose
        name ends in _token_id) that has no row in an embedding of `vocab_size` rows.
        """
        file = self.path / GENERATION
        settings = read_object(file, kind="settings of generation") if file.is_file() else self.ids
        if vocab_size is None:
            return settings
        for name, value in settings.items():
            if not name.endswith("_token_id") or value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(is_a(token, int) and 0 <= token < vocab_size for token in ids):
                raise ValueError(
                    f"{file if file.is_file() else self.path}: {name} must be a token id of the model, from 0 to "
                    f"{vocab_size - 1}, or a list of token ids; got {reprlib.repr(value)}: correct the field"
                )
        return settings

    def encode(self, text: str) -> list[int]:
        """Token ids of a document: without added special tokens, ended by one end-of-document token if there is one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids if self.end is None else [*ids, self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a document without special tokens; all spaces are kept."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def has_text(self, ids: Sequence[int]) -> bool:
        """Whether a document contains more than special tokens; an unknown word counts as text."""
        marks = set(self._tokenizer.all_special_ids)
        # some tokenizers use one token for unknown words and for the end of a document
        if (unknown := self._tokenizer.unk_token_id) != self.end:
            marks.discard(unknown)
        return any(token not in marks for token in ids)

    def missing(self, tokens: Sequence[str]) -> list[str]:
        """The given special tokens that this tokenizer does not have."""
        return [token for token in tokens if token not in self._tokenizer.get_added_vocab()]

    def check(self, *, vocab_size: int) -> None:
        """Raise ValueError if a token has no row in the embedding; ids can have gaps."""
        if self.rows > vocab_size:
            raise ValueError(
                f"the embedding must have a row for every token; the tokenizer in {self.path} has {len(self)} tokens "
                f"with ids up to {self.rows - 1}, and the model's embedding {vocab_size} rows: name the tokenizer of "
                "this model with --tokenizer"
            )

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder, in a form that transformers 4 and 5 read, with generation_config.json."""
        self._tokenizer.save_pretrained(str(folder))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # transformers 5 writes the new name; transformers 4 accepts only the old name
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # a list is the new form; transformers 5 reads the old name too
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        for how_it_was_loaded in ("is_local", "local_files_only"):
            config.pop(how_it_was_loaded, None)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / GENERATION).write_text(json.dumps(dict(self.generation()), indent=2) + "\n", encoding="utf-8")


def reason(error: Exception) -> str:
    """The type and the message of another library's error, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


def _damaged_file(folder: Path) -> Path:
    """The first damaged file of a tokenizer; the folder if no file is damaged."""
    for path in (folder / name for name in _JSON_FILES):
        try:
            stored = json.loads(path.read_bytes())
        except FileNotFoundError:
            continue
        except (OSError, RecursionError, ValueError):
            return path
        if not isinstance(stored, dict) or (path.name == WHOLE and "model" not in stored):
            return path
    return folder
