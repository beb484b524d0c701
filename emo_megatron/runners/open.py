"""Open a checkpoint of Megatron or Hugging Face: make the runner, and a function that reads documents."""

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
"""Largest default number of tokens per row; --seq-length may be larger if the model supports more."""

Read = Callable[[Path, Calibration], Documents]
"""Reads the documents of a file as tokens of the model; the result is the same on every rank."""


def is_hugging_face(checkpoint: Path) -> bool:
    """Whether the checkpoint is a Hugging Face folder."""
    return (checkpoint / "config.json").is_file()


def can_import(folder: Path) -> bool:
    """Whether the command import converts this Hugging Face folder to a Megatron checkpoint."""
    from emo_megatron.hf.formats import FORMATS

    return read_object(folder / "config.json", kind="a model's configuration").get("model_type") in FORMATS


def open_hugging_face(
    folder: Path, *, texts: Sequence[Path], tokenizer: Path | None, seq_length: int | None, micro_batch_size: int
) -> tuple[ExpertRunner, Read]:
    """Open a Hugging Face folder.

    Args:
        folder: folder in the format of transformers.
        texts: files to read; if one of them holds text, the tokenizer is checked before the model is loaded.
        tokenizer: folder of a tokenizer; default: the model's own.
        seq_length: tokens per row; default: the model's limit, but at most LONGEST_ROW.
        micro_batch_size: rows per forward pass.
    """
    from emo_megatron.hf.tokenizer import Tokenizer
    from emo_megatron.runners.huggingface import HuggingFaceRunner, load_hugging_face

    config = folder / "config.json"
    described = read_object(config, kind="a model's configuration")
    vocab_size: int = checked(described, {"vocab_size": int}, where=str(config))["vocab_size"]
    _must_exist(texts)
    # files of tokens need no tokenizer, and the folder may have none
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
    """Open this rank's part of a Megatron checkpoint. Starts Megatron, which a process can do only once.

    Args:
        checkpoint: the folder of --save, or one iteration's folder in that folder.
        layout: Megatron's flags for the parallel sizes.
        more: other flags of Megatron, given by the user; measurements may depend on these flags.
        texts, tokenizer, micro_batch_size: as for `open_hugging_face`; the default tokenizer is the run's.
        seq_length: tokens per row; default: the sequence length of training, but at most LONGEST_ROW.
    """
    from emo_megatron.runners.loading import check_rows, checkpoint_in, load_model
    from emo_megatron.runners.run_tokenizer import TOKENIZER_FLAGS, null_flags, text_tokenizer, tokenizer_args

    _must_exist(texts)
    flags = ["--load", str(checkpoint.absolute()), *layout, *more]
    stored = checkpoint_in(flags)
    vocab_size = stored.args.padded_vocab_size
    given = {word.partition("=")[0] for word in flags} & set(TOKENIZER_FLAGS)
    if tokenizer is not None and given:
        raise ValueError(f"--tokenizer and Megatron's {' and '.join(sorted(given))} exclude each other: give only one")
    reader = None
    if text := next(filter(is_text, texts), None):
        args = tokenizer_args(stored.args, flags)
        reader = text_tokenizer(args, named=tokenizer, vocab_size=vocab_size)
        if reader is None:
            raise ValueError(NO_TOKENIZER.format(text))
    # Megatron reads sys.argv, where the last value of a flag counts: the tokenizer's flags were used above, and the
    # model itself needs no tokenizer
    sys.argv[1:] = [*flags, *null_flags(vocab_size=vocab_size)]
    model, args = load_model(stored)
    # these modules import Megatron, and the replacements for the CPU must be active before that import
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
    """Raise FileNotFoundError for a missing file, before a model is loaded."""
    for path in texts:
        if not path.exists() and not Path(f"{path}.idx").exists():
            raise FileNotFoundError(f"{path} must be a file, or the prefix of {path}.idx and {path}.bin; found neither")
