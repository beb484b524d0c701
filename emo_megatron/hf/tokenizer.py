"""The tokenizer that goes with a model: read from a folder, checked against the vocabulary, carried along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
_JSON_FILES = (CONFIG, WHOLE, "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """A Hugging Face tokenizer of a folder; nothing is fetched, and no code of the folder is run.

    The folder holds tokenizer.json or the files of a tokenizer of transformers; ValueError names one that is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        from transformers import AutoTokenizer

        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise ValueError(
                f"{self.path} holds no tokenizer: name a folder with {CONFIG} (--tokenizer), as "
                "save_pretrained writes it"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                # a path, never a name of the hub; without an answer transformers asks about code on the terminal
                str(self.path.absolute()),
                local_files_only=True,
                trust_remote_code=False,
            )
            # some faults of a file show in its first use
            self._tokenizer.encode("a", add_special_tokens=False)
        # files of anyone end in errors of any kind, those of the compiled library included
        except Exception as error:
            raise ValueError(f"the tokenizer in {_damaged_file(self.path)} cannot be read: {reason(error)}") from None
        if absent := self._absent_files():
            raise ValueError(
                f"the tokenizer in {self.path} is not whole: {' and '.join(absent)} or {WHOLE} must be in it"
            )

    def __len__(self) -> int:
        return len(self._tokenizer)

    def _absent_files(self) -> list[str]:
        """Files of the vocabulary that are not there, in whose place transformers puts an empty one."""
        names = getattr(self._tokenizer, "vocab_files_names", {})
        needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
        # one file holds what the others do
        if not needed or (self.path / WHOLE).is_file():
            return []
        return [name for name in needed if not (self.path / name).is_file()]

    @property
    def ids(self) -> dict[str, int | None]:
        """Special tokens as config.json names them."""
        kinds = ("bos", "eos", "pad")
        return {f"{k}_token_id": getattr(self._tokenizer, f"{k}_token_id") for k in kinds}

    @property
    def end(self) -> int | None:
        """Id that ends a document; None if the tokenizer has none, and documents end without one."""
        return self.ids["eos_token_id"]

    def encode(self, text: str) -> list[int]:
        """Token ids of a document: none that the tokenizer adds of its own, its end of document once, if it has one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids if self.end is None else [*ids, self.end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a document without special tokens, no space of it tidied away."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def has_text(self, ids: Sequence[int]) -> bool:
        """Whether a document is more than special tokens; an unknown word is text."""
        marks = set(self._tokenizer.all_special_ids)
        # some tokenizers have one token for both
        if (unknown := self._tokenizer.unk_token_id) != self.end:
            marks.discard(unknown)
        return any(token not in marks for token in ids)

    def missing(self, tokens: Sequence[str]) -> list[str]:
        """Those of some special tokens that are none of this tokenizer's."""
        return [token for token in tokens if token not in self._tokenizer.get_added_vocab()]

    def check(self, *, vocab_size: int) -> None:
        """Refuse a vocabulary that the embedding has no rows for."""
        if len(self) > vocab_size:
            raise ValueError(
                f"the tokenizer in {self.path} has {len(self)} tokens and the model's embedding {vocab_size} rows: "
                "it belongs to another model; name this model's with --tokenizer"
            )

    def save(self, folder: Path) -> None:
        """Write it into a folder, as transformers 4 and 5 both read it."""
        self._tokenizer.save_pretrained(str(folder))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # the name since transformers 5 of what transformers 4 knows by this one
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        for how_it_was_loaded in ("is_local", "local_files_only"):
            config.pop(how_it_was_loaded, None)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


def _damaged_file(folder: Path) -> Path:
    """The first file of a tokenizer that is not what its name says; the folder if all are."""
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
