"""The tokenizer of a training run, built from files on this machine; nothing is downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_megatron.experts.calibration import TextTokenizer
from emo_megatron.hf.tokenizer import Tokenizer, reason

HUGGING_FACE = "HuggingFaceTokenizer"
TOKENIZER_FLAGS = ("--tokenizer-type", "--tokenizer-model")
"""Megatron's flags that choose a tokenizer."""
NO_TOKENIZER = (None, "NullTokenizer", "NullMultimodalTokenizer")
"""Values of --tokenizer-type that do not read text."""
_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
}
"""Per --tokenizer-type, the flags with its files; for other types, the flag is tokenizer_model."""


def hugging_face_tokenizer(args: argparse.Namespace, *, named: Path | None, vocab_size: int) -> Tokenizer | None:
    """The Hugging Face tokenizer of --tokenizer or of the run; None if neither has one.

    `args` are the run's flags, `named` is the folder of the command's --tokenizer, `vocab_size` is the number of
    rows of the embedding.
    """
    extra: list[str] = []
    if named is None:
        if getattr(args, "tokenizer_type", None) != HUGGING_FACE:
            return None
        stored = _file_of_run(args, "tokenizer_model")
        named = Path(stored)
        if not stored or not named.is_dir():
            raise ValueError(
                f"the tokenizer of the run, {stored or 'unnamed'}, is not a folder on this machine: pass the "
                "tokenizer's folder with --tokenizer"
            )
        extra = list(getattr(args, "special_tokens", None) or [])
    tokenizer = Tokenizer(named)
    tokenizer.check(vocab_size=vocab_size)
    if missing := tokenizer.missing(extra):
        raise ValueError(
            f"the run's tokenizer had special tokens that {named} does not have ({', '.join(missing)}): save the "
            "tokenizer with these tokens, and pass its folder with --tokenizer"
        )
    return tokenizer


def text_tokenizer(args: argparse.Namespace, *, named: Path | None, vocab_size: int) -> TextTokenizer | None:
    """The tokenizer for text: that of `hugging_face_tokenizer`, or else Megatron's; None if the run had none."""
    found = hugging_face_tokenizer(args, named=named, vocab_size=vocab_size)
    kind = getattr(args, "tokenizer_type", None)
    if found is not None or kind in NO_TOKENIZER:
        return found
    return MegatronTokenizer(_build(args), kind=kind)


def tokenizer_args(stored: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a run, where flags about the tokenizer in a command line replace the stored ones."""
    # this module imports Megatron, and the replacements for the CPU must be active before that import
    from emo_megatron.checkpoint.model_flags import megatron_parser

    parser = megatron_parser()
    names = {
        action.dest
        for group in parser._action_groups
        for action in group._group_actions
        if group.title == "tokenizer" or "tokenizer" in action.dest
    }
    parser.set_defaults(**{name: getattr(stored, name) for name in names & vars(stored).keys()})
    given = vars(parser.parse_known_args(list(argv))[0])
    chosen = {name: given[name] for name in names if name in given}
    # Megatron's builder also reads rank and pad_vocab_size
    return argparse.Namespace(**vars(stored) | chosen | {"rank": 0, "pad_vocab_size": False})


def null_flags(*, vocab_size: int) -> list[str]:
    """Flags for Megatron without a tokenizer: Megatron reads no text here, and the run's tokenizer may be missing."""
    kind = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    # with a vocabulary file, Megatron raises an error for a checkpoint of another tokenizer type
    return [*kind, "--vocab-file", ""]


class MegatronTokenizer:
    """A tokenizer built by Megatron, with the interface of the Hugging Face tokenizer.

    `kind` is the --tokenizer-type, for messages.
    """

    def __init__(self, tokenizer: Any, *, kind: str | None) -> None:
        self._tokenizer = tokenizer
        try:
            self.end = _id(tokenizer, "eod")
            nothing, letter = tokenizer.tokenize(""), tokenizer.tokenize("a")
        except Exception as error:
            raise ValueError(
                f"the tokenizer of the run, a {kind}, cannot read text ({reason(error)}): pass a Hugging Face "
                "tokenizer with --tokenizer"
            ) from None
        # tokens around the empty text, which are also around other texts, were added by the tokenizer
        has_added = len(nothing) > 0
        first, last = _id(tokenizer, "bos"), self.end
        self._adds_first = has_added and first is not None and nothing[0] == letter[0] == first
        self._adds_last = has_added and last is not None and nothing[-1] == letter[-1] == last

    def encode(self, text: str) -> list[int]:
        """Token ids of a document without added tokens, and with one end-of-document token if the tokenizer has one."""
        ids = [int(token) for token in self._tokenizer.tokenize(text)]
        ids = ids[1 if self._adds_first else 0 : -1 if self._adds_last else None]
        return ids if self.end is None else [*ids, self.end]


def _id(tokenizer: Any, name: str) -> int | None:
    """The id of a special token, or None; libraries mark a missing token by None, a negative id or an error."""
    try:
        found = getattr(tokenizer, name)
    except (AttributeError, KeyError, NotImplementedError):
        return None
    return None if found is None or found < 0 else int(found)


def _build(args: argparse.Namespace) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    kind = args.tokenizer_type
    for name in _FILES.get(kind, ("tokenizer_model",)):
        path = _file_of_run(args, name)
        if not path or not Path(path).exists():
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f'the tokenizer of the run, {path or kind}, was not found: pass its path with --megatron-args="{flag} '
                'PATH", or pass its Hugging Face folder with --tokenizer'
            )
    try:
        return build_tokenizer(args)
    # missing libraries and unsuitable files cause many types of errors
    except Exception as error:
        raise ValueError(
            f"the tokenizer of the run, a {kind}, cannot be built here: {reason(error)}; pass its Hugging Face "
            "folder with --tokenizer"
        ) from None


def _file_of_run(args: argparse.Namespace, name: str) -> str:
    return str(getattr(args, name, None) or "")
