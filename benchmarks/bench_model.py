"""How much time does EMO add to a training step of a whole Megatron model?

A GPT of Megatron's local spec trains on one rank in bf16 with Megatron's DistributedDataParallel and Adam (fp32 main
weights). The standard MoE and EMO run in turns, with the same weights, packed documents, attention inside documents,
balance loss and z loss. "Pools of all experts" does all the work of pools and chooses the experts of the standard
router; "metrics off" does not record router metrics for the log. Timing starts only after pools of all experts give the
routing, loss and gradients of the standard model. On GPUs results are milliseconds; on a CPU results are ratios.

    python benchmarks/bench_model.py --quick                  # a tiny model, seconds
    python benchmarks/bench_model.py --device cuda            # 12 layers, d=1024, 32 experts, 32768 tokens per step
    python benchmarks/bench_model.py --device cuda --dispatcher dedup
    python benchmarks/bench_model.py --device cuda --trace traces    # the profiler's traces of one step
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from model_check import check_models
from model_cost import peak_flops, step_flops
from model_traces import trace_models
from models import METRICS_OFF, STANDARD, ModelSize, Training, batches_of, build_training
from timing import (
    RESULTS,
    Device,
    Rounds,
    Samples,
    describe_machine,
    estimate,
    interleave,
    markdown_table,
    pick_device,
    ratio,
    result_name,
    run_script,
    write_results,
)

from emo_megatron import ops

QUICK = ModelSize(
    layers=2,
    model_dim=64,
    heads=4,
    experts=8,
    top_k=2,
    ffn_dim=32,
    vocab=256,
    seq_length=64,
    rows=2,
    document_tokens=16,
)
CPU = ModelSize(
    layers=2,
    model_dim=128,
    heads=4,
    experts=16,
    top_k=4,
    ffn_dim=64,
    vocab=1024,
    seq_length=256,
    rows=2,
    document_tokens=64,
)
GPU = ModelSize(
    layers=12,
    model_dim=1024,
    heads=16,
    experts=32,
    top_k=4,
    ffn_dim=512,
    vocab=16384,
    seq_length=2048,
    rows=16,
    document_tokens=512,
)
Memory = dict[str, tuple[int, int]]
"""Contender -> peak bytes allocated and reserved."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps of a Megatron model with the standard MoE and with EMO, in turns."""

    quick: bool = False
    """A tiny model and few rounds, to test that everything runs; the ratios are not meaningful."""
    device: Device = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    threads: int = 2
    """CPU threads."""
    dispatcher: Literal["megatron", "dedup"] = "megatron"
    """Token dispatcher of the models with pools; the standard model keeps Megatron's alltoall."""
    layers: int | None = None
    """Layers. Default: 2, on a GPU 12."""
    model_dim: int | None = None
    """Width of the model. Default: 128, on a GPU 1024."""
    heads: int | None = None
    """Attention heads. Default: 4, on a GPU 16."""
    experts: int | None = None
    """Routed experts, in addition to one shared expert. Default: 16, on a GPU 32."""
    top_k: int | None = None
    """Routed experts per token. Default: 4."""
    ffn_dim: int | None = None
    """Hidden width of each expert. Default: 64, on a GPU 512."""
    vocab: int | None = None
    """Size of the vocabulary. Default: 1024, on a GPU 16384."""
    seq_length: int | None = None
    """Tokens per row. Default: 256, on a GPU 2048."""
    rows: int | None = None
    """Rows per micro-batch; a step has one micro-batch. Default: 2, on a GPU 16."""
    document_tokens: int | None = None
    """Mean number of tokens per document. Default: 64, on a GPU 512."""
    seconds: float | None = None
    """Seconds to spend on steps, at least five rounds; building and checking need more time. Default: 60, quick 1."""
    trace: Path | None = None
    """Folder for the profiler's traces of one step of the standard model and of EMO, and for a CSV and a page of their
    operations and gaps. With this option, nothing is timed."""
    output: Path = field(default=RESULTS)
    """Folder of the results: a CSV and a page, both named after the hardware."""

    def size(self, default: ModelSize) -> ModelSize:
        """The model: what was asked for, else the default.

        Raises:
            ValueError: it cannot be built.
        """
        names = [f.name for f in dataclasses.fields(ModelSize)]
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(default, **asked)


def main(options: Options) -> list[Path]:
    """Check, time, write; returns the files.

    Raises:
        ValueError: the models do not compute the same, or an option is wrong.
    """
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    size = options.size(QUICK if options.quick else GPU if device.type == "cuda" else CPU)
    metadata = describe_machine(device, threads=options.threads)
    metadata["routing ops"] = ops.why_not_native(device.type) or "native"
    metadata["dispatcher of the models with pools"] = options.dispatcher
    gpu_name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    question = "model" if options.dispatcher == "megatron" else f"model-{options.dispatcher}"
    name = result_name(question, device=device, is_quick=options.quick)
    training = build_training(size, device=device, dispatcher=options.dispatcher)
    training, size = _checked(training, size, device)
    head = _head(metadata, size)
    if options.trace is not None:
        return trace_models(training, options.trace, name, head=head, device=device)

    seconds = options.seconds or (1.0 if options.quick else 60.0)
    samples = interleave(training.steps(), device=device, rounds=Rounds(fewest=5, most=200, seconds=seconds))
    memory = _peak_memory(training) if device.type == "cuda" else {}
    flops = step_flops(size, training.batches[0])
    rows = list(_rows(samples, memory, size, dispatcher=options.dispatcher, gpu_name=gpu_name, flops=flops))
    page = head + _page(rows, samples, gpu_name=gpu_name, flops=flops)
    print(page)
    return write_results(options.output, name, rows=rows, page=page)


def _checked(training: Training, size: ModelSize, device: torch.device) -> tuple[Training, ModelSize]:
    """The models after their check, with half the rows as often as the memory of the GPU asks for it."""
    while True:
        try:
            check_models(training)
        except torch.OutOfMemoryError:
            if size.rows == 1:
                raise
        else:
            return training, size
        size = dataclasses.replace(size, rows=size.rows // 2)
        print(f"out of memory: going on with --rows {size.rows}", flush=True)
        training = dataclasses.replace(training, batches=batches_of(size, device))
        gc.collect()
        torch.cuda.empty_cache()


def _peak_memory(training: Training) -> Memory:
    """Of one step of each contender, beginning with nothing cached but the weights, gradients and optimizer states."""
    found = {}
    for name, step in training.steps().items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step.backward(step.forward())
        found[name] = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    return found


def _peer(name: str) -> str:
    """The standard model with metrics as this contender has them."""
    return STANDARD + METRICS_OFF if name.endswith(METRICS_OFF) else STANDARD


def _rows(
    samples: dict[str, Samples], memory: Memory, size: ModelSize, *, dispatcher: str, gpu_name: str, flops: int
) -> Iterator[dict[str, Any]]:
    """The CSV: a row a contender. Times are of a GPU only, and empty on a CPU."""
    peak = peak_flops(gpu_name)
    for name, found in samples.items():
        row: dict[str, Any] = dataclasses.asdict(size) | {"dispatcher": dispatcher}
        row |= {"contender": name, "rounds": len(found.total)}
        time, forward = estimate(found.total), estimate(found.forward)
        numbers = {
            "step_ms": round(time.median * 1e3, 3),
            "step_ms_low": round(time.low * 1e3, 3),
            "step_ms_high": round(time.high * 1e3, 3),
            "forward_ms": round(forward.median * 1e3, 3),
            "tokens_per_second": round(size.tokens / time.median),
            "mfu": "" if peak is None else round(flops / time.median / peak, 4),
        }
        row |= numbers if gpu_name else dict.fromkeys(numbers, "")
        allocated, reserved = memory.get(name, ("", ""))
        row |= {"peak_allocated_bytes": allocated, "peak_reserved_bytes": reserved}
        times = ratio(found.total, samples[_peer(name)].total)
        row |= {"times_standard": round(times.median, 4)}
        row |= {"times_standard_low": round(times.low, 4)}
        yield row | {"times_standard_high": round(times.high, 4)}


def _head(metadata: dict[str, str], size: ModelSize) -> str:
    lines = "\n".join(f"- {name}: {value}" for name, value in metadata.items())
    return (
        f"# Training steps of a whole model\n\n{lines}\n\nThe model: {size}. Megatron's local spec, bf16, Adam with "
        "fp32 main weights, one rank; learned positions, experts one after the other (SequentialMLP). Medians with "
        "95 % intervals, rounds in pairs.\n\n"
    )


def _page(rows: list[dict[str, Any]], samples: dict[str, Samples], *, gpu_name: str, flops: int) -> str:
    head = ["contender", "x the standard MoE", "x itself with metrics off"]
    head += ["ms per step", "tokens/s", "MFU", "peak allocated, GB", "peak reserved, GB"] if gpu_name else []
    table = []
    for row in rows:
        name = row["contender"]
        without = samples.get(name + METRICS_OFF)
        cells = [name, str(ratio(samples[name].total, samples[_peer(name)].total))]
        cells.append("" if without is None else str(ratio(samples[name].total, without.total)))
        if gpu_name:
            cells += [str(estimate(samples[name].total).scaled(1e3)), f"{row['tokens_per_second']}"]
            cells.append("not known" if row["mfu"] == "" else f"{row['mfu']:.1%}")
            cells += [f"{row[key] / 1e9:.2f}" for key in ("peak_allocated_bytes", "peak_reserved_bytes")]
        table.append(cells)
    parts = ["## Forward, backward and optimizer\n", markdown_table(head, table)]
    parts.append(
        "A contender without metrics is compared with the standard MoE without metrics. Metrics are reported after "
        "every step, as Megatron does with --log-interval 1."
    )
    if gpu_name:
        parts.append(
            f"MFU counts {flops / 1e12:.2f} TFLOP per step: matrix products of active weights, and attention inside "
            "documents. Peaks include weights, gradients and optimizer states, which all contenders share."
        )
    else:
        parts.append("Times and memory: not measured (no GPU).")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
