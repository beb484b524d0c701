"""Import a Hugging Face checkpoint of EMO, or any Qwen2-MoE, as one that stock Megatron loads.

python -m emo_megatron import --folder exported/french --output runs/french
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from emo_megatron.checkpoint.edit import SELECTION_FILE
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.checkpoint.writer import Note, write_checkpoint
from emo_megatron.commands.options import check_least, unset
from emo_megatron.config import pool_config_of
from emo_megatron.experts.selection import load_selection_of_module
from emo_megatron.files import must_not_exist, whole
from emo_megatron.hf import tokenizer as tokenizers
from emo_megatron.hf.adapter_base import CONFIG as ADAPTER
from emo_megatron.hf.config_file import RECORD, record
from emo_megatron.hf.folder import CONFIG, HuggingFaceFolder
from emo_megatron.hf.mapping import FUSED_NORM, OWN_NORM
from emo_megatron.hf.megatron import check_router, flags_of, megatron_weights
from emo_megatron.hf.prediction import FILE, Prediction
from emo_megatron.runners.parity import Converted, Parity, measure_parity

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a Hugging Face checkpoint (qwen2_moe, or the emo format of the authors) to a Megatron checkpoint.

    The command compares the logits of both models and keeps the result only if the logits agree.

    For example:
        emo_megatron import --folder downloads/emo --output runs/emo
        emo_megatron import --folder exported/perl --adapter adapters/perl --output runs/perl_tuned
    """

    folder: Path
    """Hugging Face folder with config.json and safetensors files."""
    output: Path
    """Checkpoint folder to write, for Megatron's --load; must not exist."""
    adapter: Annotated[Path | None, unset("FOLDER", "none")] = None
    """Folder of a LoRA adapter of Hugging Face peft that was trained on --folder; its changes are merged in."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Megatron's --transformer-impl of the run that will load the checkpoint: the two name one norm differently."""
    tokenizer: Annotated[Path | None, unset("FOLDER", "the tokenizer in --folder, if there is one")] = None
    """Folder of the tokenizer."""
    parity_tokens: int = 64
    """Number of random tokens on which the logits are compared, on the CPU in float32; 0 skips the comparison."""

    def __post_init__(self) -> None:
        check_least(self, 0, "parity_tokens")


def run(options: Options) -> Converted:
    """Write the checkpoint, weights only, with the flags of its model for --use-checkpoint-args; `tokenizer/` in it
    holds the tokenizer, if there is one. A result of other logits is not left."""
    must_not_exist(options.output)
    source = HuggingFaceFolder(options.folder)
    check_router(source.architecture, where=options.folder / CONFIG)
    notes: dict[str, Note] = {}
    has_tokenizer = options.tokenizer is not None or (options.folder / tokenizers.CONFIG).exists()
    if has_tokenizer:
        tokenizer = tokenizers.Tokenizer(options.tokenizer or options.folder)
        tokenizer.check(vocab_size=source.architecture.vocab_size)
        # damage is found before anything is written
        tokenizer.generation(vocab_size=source.architecture.vocab_size)
        notes[TOKENIZER_FOLDER] = tokenizer.save
    prediction = None
    if (options.folder / FILE).exists():
        prediction = Prediction(options.folder, source.architecture, dtype=source.dtype)
    if (file := options.folder / SELECTION_FILE).exists():
        layers = [layer + 1 for layer in source.architecture.moe_layers]
        selection = load_selection_of_module(
            file,
            num_experts=source.architecture.num_experts,
            layers=[*layers, *(prediction.moe_layers if prediction else ())],
            wanted="the file must be the Selection that this module was cut with; replace the file or move it away",
        )
        notes[SELECTION_FILE] = selection.save
    with contextlib.ExitStack() as stack:
        if options.adapter is not None:
            # the package peft is optional
            from emo_megatron.hf import adapter

            source = stack.enter_context(adapter.merged(source, options.adapter, output=options.output))
            notes[ADAPTER] = functools.partial(shutil.copyfile, options.adapter / ADAPTER)
        parity = _write(options, source, prediction, notes=notes, has_tokenizer=has_tokenizer)
    return Converted(path=options.output, parity=parity, has_tokenizer=has_tokenizer)


def _write(
    options: Options,
    source: HuggingFaceFolder,
    prediction: Prediction | None,
    *,
    notes: dict[str, Note],
    has_tokenizer: bool,
) -> Parity | None:
    """Write the checkpoint of a folder's model, and compare both."""
    moe_norm = OWN_NORM if options.transformer_impl == "transformer_engine" else FUSED_NORM
    pools = record(source.config, RECORD).get("pools") or {}
    args = flags_of(
        source.architecture,
        dtype=source.dtype,
        moe_norm=moe_norm,
        pools=dataclasses.asdict(pool_config_of(pools, where=f"{options.folder / CONFIG}, {RECORD}.pools")),
        tokenizer=str(options.output.resolve() / TOKENIZER_FOLDER) if has_tokenizer else None,
    )
    weights = megatron_weights(source.architecture, source.weight, dtype=source.dtype, moe_norm=moe_norm)
    if prediction:
        vars(args).update(prediction.flags)
        weights |= prediction.weights(moe_norm)
    with whole(options.output, is_new=True) as unfinished:
        write_checkpoint(unfinished, weights, args=args, notes=notes)
        if not options.parity_tokens:
            return None
        return measure_parity(MegatronCheckpoint(unfinished), source, tokens=options.parity_tokens)
