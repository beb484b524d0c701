"""A tiny tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

WORDS = ("the", "of", "experts", "route", "document", "pool", "module", "keeps", "token", "and")


def write_tokenizer(folder: Path, *, size: int = 40) -> Path:
    """A word-level tokenizer of `size` tokens with an end-of-text token, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "<unk>", *WORDS]
    vocabulary = {
        word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(size))][:size])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder
