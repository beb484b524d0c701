"""The command stats: measure what the experts of a model do on calibration documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emo_megatron.commands.options import DataOptions
from emo_megatron.experts.stats import load_stats
from emo_megatron.files import must_be_writable


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
    stats = model.statistics(read(options.data, options.calibration), outputs=options.outputs)
    if model.is_writer:
        if output.exists() and load_stats(output).digest() != stats.digest():
            raise ValueError(
                f"{output} holds the statistics of something else: other weights, --data, --seq-length, dtype, "
                "--outputs or --megatron; name another file with --output"
            )
        stats.save(output)
    return output
