"""Tiny tokenizers and texts, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WORDS = ("the", "of", "experts", "route", "document", "pool", "module", "keeps", "token", "and")
END = "<|endoftext|>"
FIRST = "<first>"
SPECIAL: dict[str, dict[str, Any]] = {
    "first": {"around": f"{FIRST} $A", "bos_token": FIRST, "eos_token": END},
    "last": {"around": f"$A {END}", "eos_token": END},
    "both": {"around": f"{FIRST} $A {END}", "bos_token": FIRST, "eos_token": END},
    "no end": {"around": f"{FIRST} $A", "bos_token": FIRST},
    "nothing": {"around": "$A"},
}
"""Tokenizers by what they put around a text."""


def write_tokenizer(folder: Path, *, size: int = 40, around: str | None = None, **special: str) -> Path:
    """A word-level tokenizer as transformers saves one; `around` is what it puts around a text, as templates say it.

    Where nothing is put around, it has an end-of-text token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [END, "<unk>", *WORDS, FIRST]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(size))][:size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if around is not None:
        known = [(word, vocabulary[word]) for word in (END, FIRST)]
        tokenizer.add_special_tokens([END, FIRST])
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=known)
    else:
        special = {"eos_token": END}
    return _save(tokenizer, folder, unk_token="<unk>", **special)


def write_numbers(folder: Path, *, size: int) -> Path:
    """A tokenizer of texts that are token ids, the last of which ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {str(i): i for i in range(size - 1)} | {END: size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _save(tokenizer, folder, eos_token=END)


def _save(tokenizer: Any, folder: Path, **special: str) -> Path:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """A file of documents that are texts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokens(path: Path, documents: Sequence[Tensor]) -> Path:
    """A file of documents that are tokens."""
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": torch.cat([*documents]), "cu_seqlens": bounds.int()}, path)
    return path


def write_alphabets(folder: Path, *, documents: int = 60, length: int = 120) -> Path:
    """Texts of three domains, which are alphabets, for a corpus."""
    rng = random.Random(1)
    for name, alphabet in {"a": "abcdefgh", "d": "0123456789", "g": "αβγδεζηθ"}.items():
        (folder / name).mkdir(parents=True)
        for number in range(documents):
            words = ("".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(length))
            (folder / name / f"{number}.txt").write_text(" ".join(words))
    return folder
