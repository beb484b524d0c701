"""Open a Megatron checkpoint for study, the way the commands that run a model do: flags in, model and documents out."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_megatron.commands.options import LONGEST_ROW, ModelOptions
from emo_megatron.experts.calibration import NO_TOKENIZER, Calibration, Documents, TextTokenizer, read_documents
from emo_megatron.experts.document_files import is_text
from emo_megatron.files import mark_of, to_output, write_any_name
from emo_megatron.mcore.flags import add_fields, fields_of, prefixed
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners.base import StudiedModel
from emo_megatron.runners.layout import check_rows
from emo_megatron.runners.loading import checkpoint_in, load_model
from emo_megatron.runners.ranks import INTERRUPTED, USER_ERROR, say_error
from emo_megatron.runners.run_tokenizer import TOKENIZER_FLAGS, null_flags, text_tokenizer, tokenizer_args
from emo_megatron.variables import stay_offline


@dataclass(frozen=True, kw_only=True)
class Opened[T: ModelOptions]:
    """A checkpoint under study.

    Attributes:
        options: of the command.
        model: this process's part of the model.
        args: Megatron's flags.
        tokenizer: reads text for the model; None where none was asked for.
    """

    options: T
    model: StudiedModel
    args: argparse.Namespace
    tokenizer: TextTokenizer | None

    def documents(self, path: Path, calibration: Calibration) -> Documents:
        """Documents of a file, in tokens of this model; the same on every rank."""
        from emo_megatron.mcore.dataset import IndexedDocuments

        return read_documents(
            path,
            calibration=calibration,
            tokenizer=self.tokenizer,
            read_indexed=IndexedDocuments,
            vocab_size=self.args.padded_vocab_size,
        )


def open_study[T: ModelOptions](
    cls: type[T], *, step: str, texts: Sequence[str], check: Callable[[T], object]
) -> Opened[T]:
    """Start Megatron with this process's arguments: its flags, and `--STEP-` flags for the fields of `cls`.

    Args:
        cls: options of the command.
        step: its name.
        texts: fields of `cls` that may name a file of texts, or a folder with one, for which there must be a tokenizer.
        check: raises ValueError for options that cannot be, an output above all; called before anything is loaded.

    Raises:
        ValueError: the options or the checkpoint cannot be.
    """
    flag = prefixed(step)
    known = argparse.ArgumentParser(allow_abbrev=False)
    add_fields(known, cls, flag=flag)
    options = fields_of(known.parse_known_args()[0], cls, flag=flag)
    check(options)

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_fields(parser.add_argument_group(step), cls, flag=flag)
        return parser

    checkpoint = checkpoint_in(sys.argv[1:])
    named = [path for name in texts if (path := getattr(options, name)) is not None]
    tokenizer = _tokenizer(options, checkpoint.args, texts=[p for p in named if is_text(p)])
    # the last of a flag counts: what the command line says of the tokenizer is done with
    sys.argv += null_flags(vocab_size=checkpoint.args.padded_vocab_size)
    loaded = load_model(checkpoint, add_args=add_args)
    from emo_megatron.checkpoint.reader import facts_of
    from emo_megatron.runners.megatron import MegatronStudy

    seq_length = options.seq_length or min(loaded.args.seq_length, LONGEST_ROW)
    check_rows(seq_length, rows=options.rows, args=loaded.args)
    model = MegatronStudy(
        loaded.model,
        facts=facts_of(checkpoint),
        seq_length=seq_length,
        rows_at_once=options.rows,
        weights=mark_of(checkpoint.path),
        megatron=shlex.join(shlex.split(options.megatron)),
    )
    return Opened(options=options, model=model, args=loaded.args, tokenizer=tokenizer)


def _tokenizer(options: ModelOptions, stored: argparse.Namespace, *, texts: Sequence[Path]) -> TextTokenizer | None:
    """What reads the texts, before the model is loaded; None if there are none.

    Raises:
        ValueError: there is none, or two, or none that can be read.
    """
    given = {word.partition("=")[0] for word in sys.argv[1:]} & set(TOKENIZER_FLAGS)
    if options.tokenizer is not None and given:
        raise ValueError(f"--tokenizer and Megatron's {' and '.join(sorted(given))} both name a tokenizer: give one")
    if not texts:
        return None
    args = tokenizer_args(stored, sys.argv[1:])
    tokenizer = text_tokenizer(args, named=options.tokenizer, vocab_size=stored.padded_vocab_size)
    if tokenizer is None:
        raise ValueError(NO_TOKENIZER.format(texts[0]))
    return tokenizer


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` in this rank, offline; what the user can mend is told in one line."""
    stay_offline()
    write_any_name()
    try:
        with stops_on_signals(), to_output():
            main()
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        say_error(error)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        # what is measured is kept; the command that started this says that it was interrupted
        sys.exit(INTERRUPTED)
