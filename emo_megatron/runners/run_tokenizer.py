"""The tokenizer of a run, which reads text for its model: from files on this machine, never from a hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_megatron.experts.calibration import TextTokenizer
from emo_megatron.hf.tokenizer import Tokenizer, reason

HUGGING_FACE = "HuggingFaceTokenizer"
TOKENIZER_FLAGS = ("--tokenizer-type", "--tokenizer-model")
"""Megatron's, which name one."""
NO_TOKENIZER = (None, "NullTokenizer", "NullMultimodalTokenizer")
"""Megatron's kinds that read no text."""
_FILES = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
}
"""Files of Megatron's kinds; of the others, their model."""


def hugging_face_tokenizer(args: argparse.Namespace, *, named: Path | None, vocab_size: int) -> Tokenizer | None:
    """The Hugging Face tokenizer that was named, or that the run had; None if it had no such one.

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
                f"the tokenizer of the run, {stored or 'unnamed'}, is not a folder here: name it with --tokenizer"
            )
        extra = list(getattr(args, "special_tokens", None) or [])
    tokenizer = Tokenizer(named)
    tokenizer.check(vocab_size=vocab_size)
    if missing := tokenizer.missing(extra):
        raise ValueError(
            f"the run gave its tokenizer more special tokens than {named} has ({', '.join(missing)}): save it with "
            "them and name that folder with --tokenizer"
        )
    return tokenizer


def text_tokenizer(args: argparse.Namespace, *, named: Path | None, vocab_size: int) -> TextTokenizer | None:
    """What reads text for a run's model: as `hugging_face_tokenizer`, or Megatron's own; None if the run had none."""
    found = hugging_face_tokenizer(args, named=named, vocab_size=vocab_size)
    kind = getattr(args, "tokenizer_type", None)
    if found is not None or kind in NO_TOKENIZER:
        return found
    return MegatronTokenizer(_build(args), kind=kind)


def tokenizer_args(stored: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a run, with those of a command line about its tokenizer in their place."""
    # it imports Megatron, which the CPU's stand-ins must precede
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
    # what Megatron's builder also looks at
    return argparse.Namespace(**vars(stored) | chosen | {"rank": 0, "pad_vocab_size": False})


def null_flags(*, vocab_size: int) -> list[str]:
    """Flags of a Megatron that reads no text: it needs no tokenizer, and the run's may lie on another machine."""
    kind = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    # where there is a vocabulary, Megatron refuses a checkpoint of another kind of tokenizer
    return [*kind, "--vocab-file", ""]


class MegatronTokenizer:
    """A tokenizer that Megatron builds, reading documents as a Hugging Face one does.

    `kind` is its --tokenizer-type, for messages.
    """

    def __init__(self, tokenizer: Any, *, kind: str | None) -> None:
        self._tokenizer = tokenizer
        try:
            self.end = _id(tokenizer, "eod")
            nothing, letter = tokenizer.tokenize(""), tokenizer.tokenize("a")
        except Exception as error:
            raise ValueError(
                f"the tokenizer of the run, a {kind}, reads no text ({reason(error)}): give --tokenizer"
            ) from None
        # what stands around no text, and around any, was added
        has_added = len(nothing) > 0
        first, last = _id(tokenizer, "bos"), self.end
        self._adds_first = has_added and first is not None and nothing[0] == letter[0] == first
        self._adds_last = has_added and last is not None and nothing[-1] == letter[-1] == last

    def encode(self, text: str) -> list[int]:
        """Token ids of a document: none that the tokenizer adds of its own, its end of document once, if it has one."""
        ids = [int(token) for token in self._tokenizer.tokenize(text)]
        ids = ids[1 if self._adds_first else 0 : -1 if self._adds_last else None]
        return ids if self.end is None else [*ids, self.end]


def _id(tokenizer: Any, name: str) -> int | None:
    """A special token's id; a library that has none says None, a negative number or nothing at all."""
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
                f'the tokenizer of the run, {path or kind}, was not found: give its path with --megatron-args="{flag} '
                'PATH", or give its Hugging Face folder with --tokenizer'
            )
    try:
        return build_tokenizer(args)
    # libraries that are missing or that files do not suit fail in many ways
    except Exception as error:
        raise ValueError(
            f"the tokenizer of the run, a {kind}, cannot be built here: {reason(error)}; name a Hugging Face "
            "folder of it with --tokenizer"
        ) from None


def _file_of_run(args: argparse.Namespace, name: str) -> str:
    return str(getattr(args, name, None) or "")
