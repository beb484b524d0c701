"""Import a Hugging Face checkpoint of EMO, or any Qwen2-MoE, as one that stock Megatron loads.

python -m emo_megatron import --folder exported/french --output runs/french
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emo_megatron.checkpoint.edit import SELECTION_FILE
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import write_checkpoint
from emo_megatron.config import pool_config_of
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import must_not_exist, whole
from emo_megatron.hf.fields import record
from emo_megatron.hf.folder import CONFIG as CONFIG_FILE
from emo_megatron.hf.folder import HuggingFaceFolder
from emo_megatron.hf.formats import RECORD
from emo_megatron.hf.mapping import FUSED_NORM, OWN_NORM, megatron_weights
from emo_megatron.hf.model_config import flags_of
from emo_megatron.hf.tokenizer import CONFIG, Tokenizer
from emo_megatron.runners.parity import Converted, check_parity_tokens, measure_parity

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Import a Hugging Face checkpoint (qwen2_moe, or the authors' emo) as a Megatron checkpoint."""

    folder: Path
    """Folder with config.json and safetensors files."""
    output: Path
    """Folder to write, for Megatron's --load; must not exist."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Megatron's layers that will load it (its flag of this name): they name one norm differently."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; by default `folder`, if it holds one."""
    parity_tokens: int = 64
    """Compare the logits with Megatron's on so many random tokens, on the CPU in float32; 0 does not."""

    def __post_init__(self) -> None:
        check_parity_tokens(self.parity_tokens)


def import_folder(options: ImportOptions) -> Converted:
    """Write the checkpoint: weights only, with the flags of its model for --use-checkpoint-args.

    Returns:
        Where it is; `tokenizer/` in it holds the tokenizer, if there is one.

    Raises:
        ValueError: the folder is damaged or holds a model that Megatron's layers do not express; nothing was written.
        RuntimeError: the result does not compute what the folder does; nothing was left.
    """
    must_not_exist(options.output)
    source = HuggingFaceFolder(options.folder)
    tokenizer = None
    if options.tokenizer or (options.folder / CONFIG).exists():
        tokenizer = Tokenizer(options.tokenizer or options.folder)
        tokenizer.check(vocab_size=source.architecture.vocab_size)
    args = _flags(source, options, has_tokenizer=tokenizer is not None)
    file = options.folder / SELECTION_FILE
    selection = load_selection(file) if file.exists() else None
    with whole(options.output, is_new=True) as unfinished:
        weights = megatron_weights(
            source.architecture,
            source.weight,
            dtype=source.dtype,
            moe_norm=OWN_NORM if options.transformer_impl == "transformer_engine" else FUSED_NORM,
        )
        write_checkpoint(unfinished, weights, args=args)
        if tokenizer:
            tokenizer.save(unfinished / TOKENIZER_FOLDER)
        if selection:
            selection.save(unfinished / SELECTION_FILE)
        parity = None
        if options.parity_tokens:
            written = MegatronCheckpoint(unfinished)
            parity = measure_parity(written, source, tokens=options.parity_tokens)
    return Converted(path=options.output, parity=parity, has_tokenizer=tokenizer is not None)


def _flags(source: HuggingFaceFolder, options: ImportOptions, *, has_tokenizer: bool) -> argparse.Namespace:
    where = f"{source.path / CONFIG_FILE}, {RECORD}"
    pools = record(source.config, RECORD).get("pools") or {}
    return flags_of(
        source.architecture,
        dtype=source.dtype,
        moe_norm=OWN_NORM if options.transformer_impl == "transformer_engine" else FUSED_NORM,
        pools=dataclasses.asdict(pool_config_of(pools, where=f"{where}.pools")),
        tokenizer=str(options.output.resolve() / TOKENIZER_FOLDER) if has_tokenizer else None,
    )


Options, run = ImportOptions, import_folder
