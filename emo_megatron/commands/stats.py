"""The command stats: measure how the experts of a model are used on calibration documents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from emo_megatron.commands.options import DataOptions
from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.stats import load_stats
from emo_megatron.files import must_be_writable
from emo_megatron.runners.cache import CachedRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(DataOptions):
    """Measure how the experts of a model are used on calibration documents, and write a statistics file.

    An interrupted measurement resumes when the same command is called again.

    For example:
        emo_megatron stats --checkpoint runs/emo --data french.jsonl --output french.stats.safetensors
    """

    checkpoint: Path
    """Megatron checkpoint (the folder of --save, or one iteration in the folder) or Hugging Face folder."""
    data: Path
    """Documents: .jsonl with a field "text", .safetensors with tokens and cu_seqlens, or an indexed dataset."""
    output: Path
    """Statistics file to write."""
    outputs: bool = False
    """Also measure the outputs of the experts, which the methods easy_ep and reap need. Slower."""


def run(options: Options) -> Path:
    """Measure, and return the path of the statistics file."""
    output = options.output
    if output.is_dir():
        raise ValueError(f"--output must be a file; got the folder {output}")
    must_be_writable(output)
    if output.exists():
        # a file that is no statistics file is not overwritten
        load_stats(output)
    if options.runs_in_ranks(options.checkpoint):
        options.run_in_ranks("stats", log=output.with_name(f"{output.name}.log"))
        return output
    model, read = options.open(options.checkpoint, texts=[options.data])
    documents = read(options.data, options.calibration)
    if model.from_writer(lambda: _is_done(options, model, documents)):
        return output
    stats = model.statistics(documents, outputs=options.outputs)
    if model.is_writer:
        stats.save(output)
    return output


def _is_done(options: Options, model: CachedRunner, documents: Documents) -> bool:
    """Whether the output already holds these statistics; statistics of other weights or documents are an error."""
    if not options.output.exists():
        return False
    found, setting = load_stats(options.output), asdict(model.setting)
    wanted = {"sha256": documents.source["sha256"]} | setting
    is_same = (
        [{name: entry.get(name) for name in wanted} for entry in found.data] == [wanted]
        and found.model.is_same(model.metadata)
        and ("gated_norm_LE" in found.tensors()) == options.outputs
    )
    if not is_same:
        raise ValueError(
            f"--output {options.output} holds statistics that were measured with other weights, --data, --seq-length, "
            "dtype, --outputs, --tensor-parallel or --megatron-args: give another file with --output"
        )
    return True
