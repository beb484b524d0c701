"""The tokenizer that goes with a model: read from a folder, checked against the vocabulary, carried along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"


class Tokenizer:
    """A Hugging Face tokenizer of a folder; nothing is fetched.

    Args:
        path: folder with tokenizer.json or the files of a tokenizer of transformers.

    Raises:
        ValueError: there is no tokenizer in it.
    """

    def __init__(self, path: Path | str) -> None:
        from transformers import AutoTokenizer

        self.path = Path(path)
        if not (self.path / CONFIG).is_file():
            raise ValueError(
                f"{self.path} holds no tokenizer: name a folder with {CONFIG} (--tokenizer), as "
                "save_pretrained writes it"
            )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(self.path), local_files_only=True)

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def ids(self) -> dict[str, int | None]:
        """Special tokens as config.json names them."""
        kinds = ("bos", "eos", "pad")
        return {f"{k}_token_id": getattr(self._tokenizer, f"{k}_token_id") for k in kinds}

    def encode(self, text: str) -> list[int]:
        """Token ids of a document, its end of document included if the tokenizer has one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        end = self._tokenizer.eos_token_id
        return ids if end is None else [*ids, end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a document without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def check(self, *, vocab_size: int) -> None:
        """Refuse a vocabulary that the embedding has no rows for.

        Raises:
            ValueError: saying both sizes.
        """
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
