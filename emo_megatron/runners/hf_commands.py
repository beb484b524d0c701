"""The commands stats, select and retention on a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from emo_megatron.commands.options import LONGEST_ROW, ModelOptions, SelectOptions, StatsOptions
from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.commands.select import select
from emo_megatron.experts.calibration import Calibration, Documents, read_documents
from emo_megatron.experts.document_files import is_text
from emo_megatron.files import mark_of
from emo_megatron.hf.tokenizer import Tokenizer
from emo_megatron.json_files import checked, read_object
from emo_megatron.runners.base import collect_stats
from emo_megatron.runners.huggingface import HuggingFaceStudy, load_hugging_face
from emo_megatron.runners.retention import measure_retention


def run_stats(options: StatsOptions) -> None:
    """As the command stats, of a Hugging Face folder."""
    documents = _documents(options, options.checkpoint, options.data, options.calibration)
    collect_stats(_study(options, options.checkpoint), documents, output=options.output, outputs=options.outputs)


def run_select(options: SelectOptions) -> None:
    """As the command select, of a Hugging Face folder."""
    folder, documents, held_out = options.checkpoint, None, None
    assert folder is not None
    if options.needs_data and options.data is not None:
        documents = _documents(options, folder, options.data, options.calibration)
    if options.max_rise is not None and options.held_out is not None:
        calibration = Calibration(num_tokens=options.tokens)
        held_out = _documents(options, folder, options.held_out, calibration)
    select(options, model=_study(options, folder), documents=documents, held_out=held_out)


def run_retention(options: RetentionOptions) -> None:
    """As the command retention, of a Hugging Face folder, up to the rows."""
    folder = options.checkpoint
    measure_retention(
        options,
        model=_study(options, folder),
        read=lambda path, calibration: _documents(options, folder, path, calibration),
    )


def _study(options: ModelOptions, folder: Path) -> HuggingFaceStudy:
    if options.processes > 1 or options.megatron:
        raise ValueError(
            f"{folder} is a Hugging Face checkpoint, which runs in one process; drop --processes and --megatron, "
            "or import it into Megatron"
        )
    model = load_hugging_face(folder)
    return HuggingFaceStudy(
        model,
        seq_length=options.seq_length or min(model.config.max_position_embeddings, LONGEST_ROW),
        rows_at_once=options.rows,
        weights=mark_of(folder),
    )


def _documents(options: ModelOptions, folder: Path, path: Path, calibration: Calibration) -> Documents:
    # tokens need no tokenizer, and a folder may have none
    tokenizer = Tokenizer(options.tokenizer or folder) if is_text(path) else None
    vocab_size = _vocab_size(folder / "config.json")
    if tokenizer:
        tokenizer.check(vocab_size=vocab_size)
    return read_documents(path, calibration=calibration, tokenizer=tokenizer, vocab_size=vocab_size)


def _vocab_size(config: Path) -> int:
    described = read_object(config, kind="a model's configuration")
    size: int = checked(described, {"vocab_size": int}, where=str(config))["vocab_size"]
    return size
