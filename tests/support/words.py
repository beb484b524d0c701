"""Tiny tokenizers and texts, made on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def write_bytes(
    folder: Path,
    *,
    text: str = "the pool of the document chooses the experts, and the experts compute",
    size: int = 300,
    change: Callable[[dict[str, Any]], object] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A byte-level BPE tokenizer as the demo trains one, with two special tokens and an added token that is not.

    The tokens are at most `size` + 1 parts of `text`, which may reach over spaces. `change` edits the content of
    tokenizer.json, and `config` has more fields of tokenizer_config.json.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # training without words, so that tokens differ between rules of splitting text into words
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, FIRST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 5, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(["<tool>"])
    stored = json.loads(tokenizer.to_str())
    if change:
        change(stored)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": FIRST} | dict(config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return folder


def split_by(regex: str) -> Callable[[dict[str, Any]], object]:
    """A change of tokenizer.json: words are the matches of a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return lambda stored: stored.update(pre_tokenizer=steps)


def adds_first(stored: dict[str, Any], *, before: Sequence[str] = (FIRST,)) -> None:
    """A change of tokenizer.json: the tokenizer of `write_bytes` puts the tokens `before` before a text."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*first, text],
        "pair": [*first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [(END, FIRST).index(token)], "tokens": [token]} for token in before
        },
    }


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
