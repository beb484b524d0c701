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

dbrx is the rule of cl100k and OLMo 2, llama-bpe of Llama 3, qwen2 of Qwen 2, gpt-2 of GPT-2 and GPT-NeoX.
"""


class Vocabulary:
    """The tokens of a tokenizer, for an embedding of `rows` rows.

    ValueError if llama.cpp cannot express the tokenizer. The fields truncation, padding and decoder of tokenizer.json
    are not stored: they do not change the tokens of a text that a model reads whole.
    """

    def __init__(self, tokenizer: Tokenizer, *, rows: int) -> None:
        self._tokenizer, self._rows = tokenizer, rows
        stored = tokenizer.definition
        if stored is None:
            raise _error(tokenizer, "be stored as tokenizer.json", "Python code")
        self.rule = _rule(tokenizer, stored)
        _check_special(tokenizer, stored["added_tokens"])
        self._kinds = {
            token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            for token in stored["added_tokens"]
        }
        self._texts = {number: text for text, number in stored["model"]["vocab"].items()}
        self._texts |= {token["id"]: token["content"] for token in stored["added_tokens"]}
        if (last := max(self._texts)) >= rows:
            raise _error(tokenizer, f"have ids below {rows}, the rows of the embedding", f"the id {last}")

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Write the tokens; rows of the embedding without a token become unused tokens."""
        rows = self._rows
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
        before, after = self._tokenizer.adds
        special.add_special_token |= {"bos": bool(before), "eos": bool(after)}
        special.add_to_gguf(writer, quiet=True)


def _rule(tokenizer: Tokenizer, stored: dict[str, Any]) -> str:
    model, steps = stored["model"], stored["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        fallback = " with bytes as a fallback" if model["type"] == "BPE" else ""
        raise _error(tokenizer, "be a byte-level BPE", f"{model['type']}{fallback}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _error(tokenizer, f"have no {name}", f"{name} {model[name]!r}")
    normalizer = stored["normalizer"] or {}
    if any(step.get("type", "NFC") != "NFC" for step in normalizer.get("normalizers", [normalizer])):
        raise _error(tokenizer, "have no normalizer, or NFC", json.dumps(normalizer)[:200])
    regex = _regex(steps.get("pretokenizers", [steps]))
    rule = RULES.get((regex or "", bool(model.get("ignore_merges"))))
    if rule is None:
        raise _error(
            tokenizer,
            f"split text into words as {', '.join(RULES.values())} do",
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


def _check_special(tokenizer: Tokenizer, added: list[dict[str, Any]]) -> None:
    """Raise ValueError for special and added tokens that llama.cpp treats differently."""
    for token in added:
        # llama.cpp does not remove spaces around tokens
        for name in ("lstrip", "rstrip", "single_word"):
            if token.get(name):
                raise _error(tokenizer, f"have no added token with {name}", f"{token['content']!r} with {name}")
    ids = tokenizer.ids
    if tokenizer.end is None:
        # llama.cpp would take the token 11
        raise _error(tokenizer, "have an eos_token", "none")
    before, after = tokenizer.adds
    if before not in ([], [ids["bos_token_id"]]) or after not in ([], [ids["eos_token_id"]]):
        raise _error(
            tokenizer,
            "add nothing to a text but its bos_token before, and its eos_token after",
            f"the tokens {before} before and {after} after",
        )


def _error(tokenizer: Tokenizer, wanted: str, got: str) -> ValueError:
    return ValueError(
        f"with --format gguf the tokenizer in {tokenizer.path} must {wanted}; got {got}, which llama.cpp cannot "
        "express: pass the folder of another tokenizer of this model with --tokenizer"
    )
