"""Open a Megatron checkpoint for study, the way the commands that run a model do: flags in, model and documents out."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emo_megatron.mcore.flags import add_fields, fields_of, prefixed
from emo_megatron.mcore.loading import checkpoint_in, load_model
from emo_megatron.mcore.ranks import INTERRUPTED, USER_ERROR, say_error
from emo_megatron.modules.calibration import Calibration, Documents, load_documents
from emo_megatron.modules.files import mark_of, to_output, write_any_name
from emo_megatron.modules.options import LONGEST_ROW, ModelOptions
from emo_megatron.modules.study import StudiedModel


@dataclass(frozen=True, kw_only=True)
class Opened[T: ModelOptions]:
    """A checkpoint under study.

    Attributes:
        options: of the command.
        model: this process's part of the model.
        args: Megatron's flags.
    """

    options: T
    model: StudiedModel
    args: argparse.Namespace

    def documents(self, path: Path, calibration: Calibration) -> Documents:
        """Documents of a file, in tokens of this model; the same on every rank."""
        from megatron.training import get_tokenizer

        from emo_megatron.mcore.dataset import IndexedDocuments

        tokenizer = get_tokenizer()
        return load_documents(
            path,
            calibration=calibration,
            tokenize=lambda text: [*tokenizer.tokenize(text), tokenizer.eod],
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
        texts: fields of `cls` that may name a file of texts, or a folder with one, for which the checkpoint's
            tokenizer is built.
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
    has_texts = any(_is_text(getattr(options, name)) for name in texts)
    flags = _tokenizer_flags(options, has_texts=has_texts, stored=checkpoint.args)
    loaded = load_model(checkpoint, add_args=add_args, flags=flags)
    from emo_megatron.mcore.facts import facts_of
    from emo_megatron.mcore.study import MegatronStudy

    model = MegatronStudy(
        loaded.model,
        facts=facts_of(checkpoint),
        seq_length=options.seq_length or min(loaded.args.seq_length, LONGEST_ROW),
        rows_at_once=options.rows,
        weights=mark_of(checkpoint.path),
        megatron=shlex.join(shlex.split(options.megatron)),
    )
    return Opened(options=options, model=model, args=loaded.args)


def _is_text(path: Path | None) -> bool:
    return path is not None and (path.suffix == ".jsonl" or any(path.glob("*.jsonl")))


def _tokenizer_flags(
    options: ModelOptions, *, has_texts: bool, stored: argparse.Namespace
) -> list[str]:
    if options.tokenizer is not None:
        kind = "HuggingFaceTokenizer"
        return ["--tokenizer-type", kind, "--tokenizer-model", str(options.tokenizer)]
    if has_texts:
        return []
    # tokens need no tokenizer, and the run's own may lie on another machine
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(stored.padded_vocab_size)]


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` in this rank; what the user can mend is told in one line."""
    write_any_name()
    try:
        with to_output():
            main()
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        say_error(error)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        # what is measured is kept; the command that started this says that it was interrupted
        sys.exit(INTERRUPTED)
