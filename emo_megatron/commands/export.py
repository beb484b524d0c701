"""The command export: convert a Megatron checkpoint, or a module, to a Hugging Face folder or a file for llama.cpp."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from emo_megatron import __version__
from emo_megatron.checkpoint.edit import SELECTION_FILE
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.commands.options import check_least, unset
from emo_megatron.config import PoolConfig
from emo_megatron.experts.select import METHODS
from emo_megatron.experts.selection import Selection, load_selection_of_module
from emo_megatron.files import must_not_exist, whole
from emo_megatron.hf.card import Origin, Retained, model_card, retained
from emo_megatron.hf.config_file import RECORD
from emo_megatron.hf.folder import SHARD_BYTES, HuggingFaceFolder, StoredModel, write_folder
from emo_megatron.hf.formats import FORMATS
from emo_megatron.hf.mapping import Architecture
from emo_megatron.hf.megatron import MegatronWeights, architecture_of
from emo_megatron.hf.prediction import FILE, check_prediction, has_prediction, save_prediction
from emo_megatron.hf.tokenizer import Tokenizer
from emo_megatron.report.rows import RANDOM, RetentionRow, load_rows
from emo_megatron.runners.parity import Converted, measure_parity
from emo_megatron.runners.run_tokenizer import hugging_face_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a Megatron checkpoint or a module for transformers, vLLM, SGLang and lm-eval, or for llama.cpp.

    The command compares the logits of both models and keeps the result only if the logits agree.

    For example:
        emo_megatron export --checkpoint runs/french --output exported/french
        emo_megatron export --checkpoint runs/french --format gguf --dtype bfloat16 --output exported/french_gguf
    """

    checkpoint: Path
    """Megatron checkpoint: the folder of --save, one iteration in the folder, or a folder written by extract."""
    output: Path
    """Folder to write; must not exist."""
    format: Literal["qwen2_moe", "emo", "gguf"] = "qwen2_moe"
    """qwen2_moe: runs without remote code. emo: the format of EMO's authors. gguf: one file, for llama.cpp."""
    tokenizer: Annotated[Path | None, unset("FOLDER", "the tokenizer of the checkpoint")] = None
    """Folder of the tokenizer."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Dtype of the weights; stored keeps the dtype of the checkpoint."""
    mtp: Literal["drop", "keep"] = "drop"
    """Layers of multi-token prediction. drop: leave out. keep: write to mtp.safetensors, which only import reads."""
    selection: Annotated[Path | None, unset("PATH", "selection.json in --checkpoint")] = None
    """Selection file of the module, for the model card."""
    retention: Annotated[Path | None, unset("PATH", "none")] = None
    """retention.json of the model, or of the parent of the module, for the model card."""
    retention_domain: Annotated[str | None, unset("NAME", "the name of the calibration file")] = None
    """Domain of the module in --retention."""
    name: Annotated[str | None, unset("TEXT", "the name of the folder of the run")] = None
    """Title of the model card."""
    parity_tokens: int = 64
    """Number of random tokens on which the logits are compared, on the CPU in float32; 0 skips the comparison."""
    shard_gb: float = SHARD_BYTES / 1e9
    """Largest size of one file of weights, in units of 10^9 bytes; gguf is always one file."""

    def __post_init__(self) -> None:
        if not 0 < self.shard_gb < math.inf:
            raise ValueError(f"--shard-gb must be a finite number above 0; got {self.shard_gb}")
        if self.format == "gguf" and self.shard_gb != SHARD_BYTES / 1e9:
            raise ValueError(f"--shard-gb must not be given with --format gguf, which is one file; got {self.shard_gb}")
        check_least(self, 0, "parity_tokens")


def run(options: Options) -> Converted:
    """Write the folder: weights, config.json, tokenizer and model card; a result of other logits is not left."""
    must_not_exist(options.output)
    checkpoint = MegatronCheckpoint(options.checkpoint)
    architecture = architecture_of(checkpoint)
    mtp = options.mtp if has_prediction(checkpoint) else None
    if options.mtp == "keep" and (mtp is None or options.format == "gguf"):
        lacks = "the checkpoint has none" if mtp is None else "a file of --format gguf has no place for them"
        raise ValueError(
            f"--mtp keep stores the layers of multi-token prediction of {checkpoint.path}, but {lacks}: remove --mtp"
        )
    if mtp == "keep":
        check_prediction(checkpoint, architecture)
    tokenizer = hugging_face_tokenizer(checkpoint.args, named=options.tokenizer, vocab_size=architecture.vocab_size)
    selection = _selection(options.selection, options.checkpoint / SELECTION_FILE, checkpoint)
    if selection and mtp == "drop":
        selection = selection.only([layer + 1 for layer in architecture.moe_layers])
    retention = _retention(options.retention, options.retention_domain, selection)
    if tokenizer:
        # a damaged file is found before anything is written
        tokenizer.generation(vocab_size=architecture.vocab_size)
    origin = Origin(
        name=_name(checkpoint),
        title=options.name,
        iteration=int(checkpoint.common.get("iteration", 0) or 0),
        samples=getattr(checkpoint.args, "consumed_train_samples", None),
        seq_length=getattr(checkpoint.args, "seq_length", None),
        pools=_pools(checkpoint),
        is_module=selection is not None,
        mtp=mtp,
    )
    dtype = DTYPES.get(options.dtype) or _stored_dtype(checkpoint)
    model = _Model(checkpoint=checkpoint, architecture=architecture, dtype=dtype, tokenizer=tokenizer, origin=origin)
    write = (_gguf if options.format == "gguf" else _hugging_face)(options, model)
    with whole(options.output, is_new=True) as folder:
        folder.mkdir(parents=True)
        written = write(folder)
        if selection:
            selection.save(folder / SELECTION_FILE)
        parity = None
        if options.parity_tokens:
            parity = measure_parity(checkpoint, written, tokens=options.parity_tokens)
        card = model_card(
            architecture,
            model_type=options.format,
            dtype=str(dtype).removeprefix("torch."),
            origin=origin,
            has_tokenizer=tokenizer is not None,
            selection=selection,
            retention=retention,
            parity=None if parity is None else str(parity),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    remark = None if mtp is None else _MTP[mtp]
    return Converted(path=options.output, parity=parity, has_tokenizer=tokenizer is not None, remark=remark)


_MTP = {
    "drop": "multi-token prediction: dropped these layers, which the format does not have (--mtp keep stores them)",
    "keep": f"multi-token prediction: the layers are in {FILE}, which the command import reads, and no server",
}


@dataclass(frozen=True, kw_only=True)
class _Model:
    """What both kinds of files are written from."""

    checkpoint: MegatronCheckpoint
    architecture: Architecture
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    origin: Origin


Write = Callable[[Path], StoredModel]
"""Writes the model and its tokenizer into a folder, and opens what was written."""


def _hugging_face(options: Options, model: _Model) -> Write:
    """Everything that can be checked before a Hugging Face folder is written."""
    format = FORMATS[options.format]
    _check_expressible(format.problems(model.architecture), model, options)
    weights = MegatronWeights(model.checkpoint, model.architecture)
    keeps_prediction, tokenizer = model.origin.mtp == "keep", model.tokenizer
    record = {RECORD: {"version": __version__, "pools": model.origin.pools}}

    def write(folder: Path) -> HuggingFaceFolder:
        if keeps_prediction:
            save_prediction(folder, model.checkpoint, dtype=model.dtype)
        write_folder(
            folder,
            format=format,
            architecture=model.architecture,
            read=weights.read,
            dtype=model.dtype,
            extra_config={**(tokenizer.ids if tokenizer else {}), **record},
            shard_bytes=int(options.shard_gb * 1e9),
            has_index=keeps_prediction,
        )
        if tokenizer:
            tokenizer.save(folder)
        return HuggingFaceFolder(folder)

    return write


def _gguf(options: Options, model: _Model) -> Write:
    """Everything that can be checked before a GGUF file is written."""
    # the package gguf is optional
    from emo_megatron.hf import gguf
    from emo_megatron.hf.gguf_vocabulary import Vocabulary

    _check_expressible(gguf.problems(model.architecture), model, options)
    weights = MegatronWeights(model.checkpoint, model.architecture)
    rows = model.architecture.vocab_size
    vocabulary = Vocabulary(model.tokenizer, rows=rows) if model.tokenizer else None

    def write(folder: Path) -> gguf.GGUFFile:
        gguf.write(
            folder / gguf.FILE,
            architecture=model.architecture,
            read=weights.read,
            dtype=model.dtype,
            vocabulary=vocabulary,
            name=model.origin.title or model.origin.name,
        )
        return gguf.GGUFFile(folder / gguf.FILE)

    return write


def _check_expressible(problems: Sequence[str], model: _Model, options: Options) -> None:
    if problems:
        raise ValueError(f"{model.checkpoint.path} cannot be exported as {options.format}: {'; '.join(problems)}")


def _selection(named: Path | None, of_module: Path, checkpoint: MegatronCheckpoint) -> Selection | None:
    if named is None and not of_module.exists():
        return None
    return load_selection_of_module(
        named or of_module,
        num_experts=checkpoint.args.num_experts,
        layers=checkpoint.moe_layers,
        wanted="--selection must be the Selection that this module was cut with",
    )


def _retention(path: Path | None, domain: str | None, selection: Selection | None) -> list[Retained]:
    if path is None:
        return []
    rows = load_rows(path)
    _check_one_model(rows, path)
    domains = sorted({row.domain for row in rows})
    methods = sorted({row.method for row in rows})
    has = f"the file has the methods {', '.join(methods)} and the domains {', '.join(domains)}"
    if selection is None:
        if found := retained(rows):
            return found
        raise ValueError(
            f"--retention {path} must have rows of chosen experts; {has}: call retention with --keep, or remove "
            "--retention"
        )
    kept, method = selection.uniform_count(purpose="a module"), selection.method
    if method not in METHODS or method == RANDOM:
        raise ValueError(
            f"--retention {path} can have no rows of this module, whose experts the method {method} chose without a "
            "domain: remove --retention"
        )
    domain = domain or _domain(selection, domains, path)
    if found := retained(rows, kept=kept, method=method, chosen_for=domain):
        return found
    raise ValueError(
        f"--retention {path} must have rows of {kept} routed experts that the method {method} chose for {domain}, as "
        f'this module\'s; {has}: call retention on the parent with --methods {method} --keep "{kept} routed", name '
        "another domain with --retention-domain, or remove --retention"
    )


def _check_one_model(rows: Sequence[RetentionRow], path: Path) -> None:
    """Raise ValueError for rows of several models: a row names its model, and no checkpoint stores such a name."""
    # for random experts the seed can be that of the choice
    for kind, found in (
        ("models", {row.model for row in rows}),
        ("training seeds", {str(row.seed) for row in rows if row.method != RANDOM}),
    ):
        if len(found) > 1:
            raise ValueError(
                f"--retention {path} must have the rows of one model, of this module's parent; got rows of the {kind} "
                f"{', '.join(sorted(found))}: name the retention.json that retention wrote for this model alone"
            )


def _domain(selection: Selection, domains: Sequence[str], path: Path) -> str:
    """The one that the calibration file of a Selection is named after."""
    entries = selection.data.get("calibration", [])
    files = [
        str(entry["file"])
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and "file" in entry
    ]
    known = {Path(file).name.partition(".")[0] for file in files} & set(domains)
    if len(known) != 1:
        raise ValueError(
            f"--retention {path} does not tell which rows are this module's, whose experts were chosen on "
            f"{', '.join(files) or 'unrecorded data'}: name the domain with --retention-domain"
        )
    return known.pop()


def _stored_dtype(checkpoint: MegatronCheckpoint) -> torch.dtype:
    stored = {info.dtype for info in checkpoint.names.values()}
    if len(stored) > 1 or not stored <= set(DTYPES.values()):
        raise ValueError(
            f"{checkpoint.path} holds weights of {', '.join(sorted(map(str, stored)))}: choose one --dtype of "
            f"{', '.join(DTYPES)}"
        )
    return stored.pop()


def _pools(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """Fields of the run's PoolConfig that are not the default."""
    return {
        field.name: value
        for field in dataclasses.fields(PoolConfig)
        if (value := getattr(checkpoint.args, field.name, field.default)) != field.default
    }


def _name(checkpoint: MegatronCheckpoint) -> str:
    """Of the run, by its folder: runs/NAME/checkpoint/iter_0000800 is NAME."""
    folder = checkpoint.path.resolve()
    names = [part for part in (folder.parent.name, folder.parent.parent.name) if part]
    named = [part for part in names if part not in ("checkpoint", "checkpoints")]
    return named[0] if named else folder.name
