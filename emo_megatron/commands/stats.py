"""The command stats: measure what the experts of a model do on calibration documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from emo_megatron.commands.options import DataOptions
from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.stats import load_stats
from emo_megatron.files import must_be_writable
from emo_megatron.runners.cache import Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Measure what the experts of a model do on calibration documents: one pass, one file."""

    checkpoint: Path
    """Megatron's (what --save named, or one iteration's folder in it) or Hugging Face's (a folder with config.json)."""
    data: Path
    """.jsonl with a "text" on every line, .safetensors with tokens and cu_seqlens, or prefix of an indexed dataset."""
    output: Path
    """Statistics file to write. Called again, an interrupted pass goes on where it was."""
    outputs: bool = False
    """Also look at what experts put out, which the methods easy_ep and reap need."""


def run(options: Options) -> Path:
    """Measure; returns the statistics file."""
    output = options.output
    if output.is_dir():
        raise ValueError(f"--output must be a file; {output} is a folder")
    must_be_writable(output)
    if output.exists():
        # nothing else is written over
        load_stats(output)
    if options.is_elsewhere(options.checkpoint):
        options.run_elsewhere("stats", log=output.with_name(f"{output.name}.log"))
        return output
    model, read = options.open(options.checkpoint, texts=[options.data])
    documents = read(options.data, options.calibration)
    if model.from_writer(lambda: _is_done(options, model, documents)):
        return output
    stats = model.statistics(documents, outputs=options.outputs)
    if model.is_writer:
        stats.save(output)
    return output


def _is_done(options: Options, model: Measured, documents: Documents) -> bool:
    """Whether the output holds these statistics; what is of something else is not written over."""
    if not options.output.exists():
        return False
    found, setting = load_stats(options.output), asdict(model.setting)
    wanted = {"sha256": documents.source["sha256"]} | setting
    is_same = (
        [{name: entry.get(name) for name in wanted} for entry in found.data] == [wanted]
        and found.model.is_same(model.facts)
        and ("norm_LE" in found.tensors()) == options.outputs
    )
    if not is_same:
        raise ValueError(
            f"{options.output} holds the statistics of something else: other weights, --data, --seq-length, dtype, "
            "--outputs, --tensor-parallel or --megatron; name another file with --output"
        )
    return True
