"""From a checkpoint, Megatron's or Hugging Face's, to a model that can be run and watched, and to its documents."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from emo_megatron.experts.calibration import (
    NO_TOKENIZER,
    Calibration,
    Documents,
    ReadIndexed,
    TextTokenizer,
    is_text,
    load_documents,
)
from emo_megatron.json_files import checked, read_object
from emo_megatron.runners.base import ExpertRunner

LONGEST_ROW = 4096
"""Tokens of a row where nobody says otherwise and the model could take more."""

Read = Callable[[Path, Calibration], Documents]
"""The documents of a file, in tokens of the model; the same on every rank."""


def is_hugging_face(checkpoint: Path) -> bool:
    """Whether a checkpoint is a Hugging Face folder."""
    return (checkpoint / "config.json").is_file()


def open_hugging_face(
    folder: Path, *, texts: Sequence[Path], tokenizer: Path | None, seq_length: int | None, micro_batch_size: int
) -> tuple[ExpertRunner, Read]:
    """The model of a Hugging Face folder.

    Args:
        folder: as transformers saves it.
        texts: what will be read; for files of texts there must be a tokenizer, before the model is loaded.
        tokenizer: folder of a tokenizer; by default the model's own.
        seq_length: tokens a row; by default what the model takes, or LONGEST_ROW.
        micro_batch_size: sequences per forward pass.
    """
    from emo_megatron.hf.tokenizer import Tokenizer
    from emo_megatron.runners.huggingface import HuggingFaceRunner, load_hugging_face

    config = folder / "config.json"
    described = read_object(config, kind="a model's configuration")
    vocab_size: int = checked(described, {"vocab_size": int}, where=str(config))["vocab_size"]
    _must_exist(texts)
    # tokens need no tokenizer, and a folder may have none
    reader = Tokenizer(tokenizer or folder) if any(map(is_text, texts)) else None
    if reader:
        reader.check(vocab_size=vocab_size)
    model = load_hugging_face(folder)
    seq_length = seq_length or min(model.config.max_position_embeddings, LONGEST_ROW)
    runner = HuggingFaceRunner(model, seq_length=seq_length, micro_batch_size=micro_batch_size)
    return runner, _reading(reader, vocab_size)


def open_megatron(
    checkpoint: Path,
    *,
    layout: Sequence[str],
    more: Sequence[str],
    texts: Sequence[Path],
    tokenizer: Path | None,
    seq_length: int | None,
    micro_batch_size: int,
) -> tuple[ExpertRunner, Read]:
    """This process's part of the model of a Megatron checkpoint. Starts Megatron, which a process can do once.

    Args:
        checkpoint: what --save named, or one iteration's folder in it.
        layout: Megatron's flags for the parallel sizes.
        more: other flags of Megatron, of the user; measurements may depend on them.
        texts, tokenizer, micro_batch_size: as for `open_hugging_face`; the tokenizer is by default that of the run.
        seq_length: tokens a row; by default what the model was trained with, or LONGEST_ROW if that is less.
    """
    from emo_megatron.runners.loading import check_rows, checkpoint_in, load_model
    from emo_megatron.runners.run_tokenizer import TOKENIZER_FLAGS, null_flags, text_tokenizer, tokenizer_args

    _must_exist(texts)
    flags = ["--load", str(checkpoint.absolute()), *layout, *more]
    stored = checkpoint_in(flags)
    vocab_size = stored.args.padded_vocab_size
    given = {word.partition("=")[0] for word in flags} & set(TOKENIZER_FLAGS)
    if tokenizer is not None and given:
        raise ValueError(f"--tokenizer and Megatron's {' and '.join(sorted(given))} both name a tokenizer: give one")
    reader = None
    if text := next(filter(is_text, texts), None):
        args = tokenizer_args(stored.args, flags)
        reader = text_tokenizer(args, named=tokenizer, vocab_size=vocab_size)
        if reader is None:
            raise ValueError(NO_TOKENIZER.format(text))
    # Megatron reads them there; the last of a flag counts, and what they say of a tokenizer is done with
    sys.argv[1:] = [*flags, *null_flags(vocab_size=vocab_size)]
    model, args = load_model(stored)
    # they import Megatron, which its stand-ins for a CPU must precede
    from emo_megatron.checkpoint.model_flags import megatron_parser, model_flags
    from emo_megatron.checkpoint.reader import metadata_of
    from emo_megatron.mcore.dataset import IndexedDocuments
    from emo_megatron.runners.megatron import MegatronRunner

    seq_length = seq_length or min(args.seq_length, LONGEST_ROW)
    check_rows(seq_length, rows=micro_batch_size, args=args)
    runner = MegatronRunner(
        model,
        metadata=metadata_of(stored),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        configuration=model_flags(stored, megatron_parser(), as_trained=True),
        megatron=shlex.join(more),
    )
    return runner, _reading(reader, vocab_size, IndexedDocuments)


def _reading(tokenizer: TextTokenizer | None, vocab_size: int, read_indexed: ReadIndexed | None = None) -> Read:
    return lambda path, calibration: load_documents(
        path, calibration=calibration, tokenizer=tokenizer, vocab_size=vocab_size, read_indexed=read_indexed
    )


def _must_exist(texts: Sequence[Path]) -> None:
    """Say that a file is missing before a model is loaded."""
    for path in texts:
        if not path.exists() and not Path(f"{path}.idx").exists():
            raise FileNotFoundError(f"there is no {path}, and no {path}.idx with {path}.bin")
