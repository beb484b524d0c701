"""The vocabulary of a GGUF file: a byte-level BPE tokenizer in the form that llama.cpp reads.

llama.cpp splits text into words by a rule that the file only names. A tokenizer whose rule has no name in llama.cpp
would give other tokens without an error, so only the rules in `RULES` are accepted. llama.cpp does not normalise text:
for a tokenizer with the normalisation NFC, text that is not in NFC gives other tokens in llama.cpp.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from emo_megatron.hf.tokenizer import Tokenizer

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RULES = {
    (GPT2, False): "gpt-2",
    (rf"{_ENDINGS}\p{{N}}{{1,3}}{_OTHERS}", True): "llama-bpe",
    (rf"{_ENDINGS}\p{{N}}{{1,3}}{_OTHERS}", False): "dbrx",
    (rf"{_ENDINGS}\p{{N}}{_OTHERS}", False): "qwen2",
}
"""(regular expression of a word, whether a word that is a token is not split) -> name in llama.cpp.

dbrx is the rule of cl100k and of OLMo 2, llama-bpe of Llama 3, qwen2 of Qwen 2 to 3, gpt-2 of GPT-2, GPT-NeoX and OLMo.
"""


class Vocabulary:
    """The tokens of a tokenizer. ValueError if llama.cpp cannot express the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        stored = tokenizer.definition
        if stored is None:
            raise _error(tokenizer, "a tokenizer.json", "a tokenizer of Python code")
        self.rule = _rule(tokenizer, stored)
        self._kinds = {
            token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            for token in stored["added_tokens"]
        }
        self._texts = {number: text for text, number in stored["model"]["vocab"].items()}
        self._texts |= {token["id"]: token["content"] for token in stored["added_tokens"]}

    def add_to(self, writer: gguf.GGUFWriter, *, rows: int) -> None:
        """Write the tokens; rows of the embedding beyond the last token become unused tokens."""
        texts = [self._texts.get(n, f"[PAD{n}]") for n in range(rows)]
        unused, normal = TokenType.UNUSED, TokenType.NORMAL
        kinds = [self._kinds.get(n, normal if n in self._texts else unused) for n in range(rows)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._tokenizer.save(folder)
            special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
        # without these fields llama.cpp chooses by the name of the rule
        special.add_special_token["bos"], special.add_special_token["eos"] = self._tokenizer.adds
        special.add_to_gguf(writer, quiet=True)


def _rule(tokenizer: Tokenizer, stored: dict[str, Any]) -> str:
    model, steps = stored["model"], stored["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        fallback = " with bytes as a fallback" if model["type"] == "BPE" else ""
        raise _error(tokenizer, "a byte-level BPE", f"{model['type']}{fallback}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _error(tokenizer, f"a BPE without {name}", f"{name} {model[name]!r}")
    if (stored["normalizer"] or {}).get("type", "NFC") != "NFC":
        raise _error(tokenizer, "no normalizer, or NFC", json.dumps(stored["normalizer"]))
    regex = _regex(steps.get("pretokenizers", [steps]))
    rule = RULES.get((regex or "", bool(model.get("ignore_merges"))))
    if rule is None:
        raise _error(
            tokenizer,
            f"the way of splitting text into words of {', '.join(RULES.values())}",
            f"pre_tokenizer {json.dumps(steps)[:200]}, ignore_merges {bool(model.get('ignore_merges'))}",
        )
    return rule


def _regex(steps: list[dict[str, Any]]) -> str | None:
    """The regular expression of a word of byte-level steps; None for other steps."""
    *first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not first:
        return GPT2 if last.get("use_regex", True) else None
    if len(first) > 1 or first[0].get("type") != "Split" or last.get("use_regex", True):
        return None
    split = first[0]
    is_plain = split.get("behavior") == "Isolated" and not split.get("invert")
    return split.get("pattern", {}).get("Regex") if is_plain else None


def _error(tokenizer: Tokenizer, wanted: str, got: str) -> ValueError:
    return ValueError(
        f"--format gguf needs {wanted}, because llama.cpp has no other tokenizers of this kind; the tokenizer in "
        f"{tokenizer.path} has {got}: pass another folder with --tokenizer"
    )
