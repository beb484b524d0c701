"""How much time do document pools add to a training step of a Megatron MoE layer?

One real MoELayer runs forward and backward, in turns with Megatron's own router and with PoolRouter, on packed
documents, with balance and z losses and recorded metrics. All variants share weights. "pools of all experts" does all
the work of pools, including document boundaries, and then chooses the same experts as the standard router, so its ratio
is the cost of the method alone. Timing starts only after output and gradients equal those of the standard layer, and
those of real pools equal the results of the reference ops. Without Transformer Engine, Megatron multiplies expert by
expert, so a GPU waits for kernel launches; all measurements are repeated with experts over torch's grouped_mm. The last
two tables show the time of each part of PoolRouter's forward pass and the number of its operations on the device.

    python benchmarks/bench_layer.py --quick     # a small layer, seconds
    python benchmarks/bench_layer.py             # d=1024, 64 experts, top-8: about three minutes on two cores
    python benchmarks/bench_layer.py --model-dim 2048 --experts 128 --ffn-dim 1024 --tokens 4096   # the paper's layer
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from layer_check import check_experts, check_routing
from layers import POOLS, SAME_CHOICES, STOCK, Layers, LayerSize, build_layers
from pieces import count_operations, router_pieces
from timing import (
    RESULTS,
    Device,
    Estimate,
    Rounds,
    Samples,
    describe_machine,
    estimate,
    interleave,
    judge,
    markdown_table,
    pick_device,
    ratio,
    result_name,
    run_script,
    write_results,
)

from emo_megatron import ops

WHOLE_METHOD = (
    "A step of a layer with pools includes the whole method: document ids from boundaries, pool sizes, pools, routing, "
    "losses and metrics. A model computes ids and sizes once per micro-batch for all layers, so its overhead per layer "
    "is smaller. Times of the routers alone are for a later layer, which reuses ids and sizes.\n"
)
TARGET = 0.02
"""Largest overhead of the method, on a CPU, of a layer of TARGET_SIZE."""
TARGET_SIZE = {"model_dim": 1024, "experts": 64}
QUICK = LayerSize(tokens=512, model_dim=128, experts=16, ffn_dim=128, top_k=4, documents=4)
CPU = LayerSize(tokens=2048, model_dim=1024, experts=64, ffn_dim=512, top_k=8, documents=16)
GPU = LayerSize(tokens=16384, model_dim=2048, experts=128, ffn_dim=1024, top_k=8, documents=64)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time a Megatron MoE layer with the standard router and with pools, in turns."""

    quick: bool = False
    """A small layer and few rounds, to test that everything runs; the ratio is not meaningful."""
    device: Device = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    threads: int = 2
    """CPU threads."""
    tokens: int | None = None
    """Tokens per micro-batch. Default: 2048, on a GPU 16384."""
    model_dim: int | None = None
    """Width of the model. Default: 1024, on a GPU the paper's 2048."""
    experts: int | None = None
    """Routed experts. Default: 64, on a GPU the paper's 128."""
    ffn_dim: int | None = None
    """Hidden width of each expert. Default: 512, on a GPU the paper's 1024."""
    top_k: int | None = None
    """Experts per token. Default: 8."""
    documents: int | None = None
    """Documents per micro-batch. Default: 16, on a GPU 64."""
    seconds: float | None = None
    """Seconds to spend on each kind of experts, at least five rounds. Default: 80, on a GPU 12, quick 2."""
    output: Path = field(default=RESULTS)
    """Folder of the results: a CSV and a page, both named after the hardware."""

    def size(self, default: LayerSize) -> LayerSize:
        """The layer: what was asked for, else the default.

        Raises:
            ValueError: it cannot be built.
        """
        names = [f.name for f in dataclasses.fields(LayerSize)]
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(default, **asked)


def main(options: Options) -> list[Path]:
    """Check, time, write; returns the files.

    Raises:
        ValueError: a variant does not compute what it should, or an option is wrong.
    """
    device = pick_device(options.device)
    torch.set_num_threads(options.threads)
    on_gpu = device.type == "cuda"
    size = options.size(QUICK if options.quick else GPU if on_gpu else CPU)
    metadata = describe_machine(device, threads=options.threads)
    metadata["routing ops"] = ops.why_not_native(device.type) or "native"
    kinds = build_layers(size, device=device)
    not_run = _check(kinds)

    seconds = options.seconds or (2.0 if options.quick else 12.0 if on_gpu else 80.0)
    rounds = Rounds(fewest=5, most=200, seconds=seconds)
    samples = {layers.expert_kind: interleave(layers.layer_steps(), device=device, rounds=rounds) for layers in kinds}
    routers = interleave(
        kinds[0].router_steps(), device=device, rounds=dataclasses.replace(rounds, seconds=seconds / 10)
    )
    pieces = router_pieces(kinds[0], rounds=10 if options.quick else 50)

    rows = [row for kind, found in samples.items() for row in _rows("layer", found, size, experts=kind)]
    rows += _rows("router", routers, size)
    rows += [
        _row(size, part=f"forward: {name}", variant=POOLS, mode="forward", time=time) for name, time in pieces.items()
    ]
    page = _page(samples, routers, metadata=metadata, size=size, is_cpu=not on_gpu, not_run=not_run)
    page += "\n" + _pieces(pieces, count_operations(kinds[0]))
    print(page)
    name = result_name("layer", device=device, is_quick=options.quick)
    return write_results(options.output, name, rows=rows, page=page)


def _check(kinds: list[Layers]) -> dict[str, str]:
    """Refuse layers that differ; drop the grouped experts where torch cannot run them, and say why."""
    check_routing(kinds[0])
    not_run = {}
    for layers in kinds[1:]:
        try:
            check_experts(layers, kinds[0])
        except RuntimeError as error:
            not_run[layers.expert_kind] = str(error).splitlines()[0]
            kinds.remove(layers)
    return not_run


def _row(
    size: LayerSize, *, part: str, variant: str, mode: str, time: Estimate, expert_kind: str = "", **more: Any
) -> dict[str, Any]:
    row = dataclasses.asdict(size) | {"part": part, "expert_kind": expert_kind}
    row |= {"variant": variant, "mode": mode}
    row |= {f"{name}_us": round(getattr(time, name) * 1e6, 1) for name in ("median", "low", "high")}
    names = ("times_stock", "times_stock_low", "times_stock_high", "rounds")
    return row | {name: more.get(name, "") for name in names}


def _rows(part: str, samples: dict[str, Samples], size: LayerSize, *, experts: str = "") -> list[dict[str, Any]]:
    """The CSV of one set of contenders."""
    rows = []
    for variant, found in samples.items():
        for mode in ("forward", "total"):
            values, stock = getattr(found, mode), getattr(samples[STOCK], mode)
            times = ratio(values, stock)
            rows.append(
                _row(
                    size,
                    part=part,
                    expert_kind=experts,
                    variant=variant,
                    mode="forward" if mode == "forward" else "forward + backward",
                    time=estimate(values),
                    times_stock=round(times.median, 4),
                    times_stock_low=round(times.low, 4),
                    times_stock_high=round(times.high, 4),
                    rounds=len(values),
                )
            )
    return rows


def _page(
    samples: dict[str, dict[str, Samples]],
    routers: dict[str, Samples],
    *,
    metadata: dict[str, str],
    size: LayerSize,
    is_cpu: bool,
    not_run: dict[str, str],
) -> str:
    parts = ["# MoE layer\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n")
    parts.append(f"The layer: {size}. Medians with 95 % intervals, rounds in pairs.\n")
    parts.append(WHOLE_METHOD)
    parts.append("## Target\n")
    first = next(iter(samples.values()))
    parts.append(f"- {_verdict(first, size, is_cpu=is_cpu)}\n")
    parts += [f"Not run: experts over {kind} ({reason}).\n" for kind, reason in not_run.items()]
    tables = {f"Layer, experts over {kind}": found for kind, found in samples.items()}
    for title, found in (tables | {"Router alone": routers}).items():
        # a router is compared with the layer it belongs to
        layer = estimate((first if found is routers else found)[STOCK].total).median
        table = []
        for variant, times in found.items():
            overhead = estimate([(a - b) / layer for a, b in zip(times.total, found[STOCK].total, strict=True)])
            milliseconds = estimate(times.total).scaled(1e3)
            fastest = f"{min(times.total) * 1e3:.2f}"
            table.append([variant, str(milliseconds), fastest, str(overhead.scaled(100))])
        parts.append(f"## {title}, forward + backward\n")
        head = ["router", "ms", "fastest, ms", "more than standard, % of the standard layer"]
        parts.append(markdown_table(head, table))
    return "\n".join(parts)


def _pieces(pieces: dict[str, Estimate], operations: dict[str, int]) -> str:
    times = [[name, str(time.scaled(1e6))] for name, time in pieces.items()]
    counts = [[name, str(count)] for name, count in operations.items()]
    return "\n".join(
        [
            "## Where PoolRouter's forward pass goes\n",
            markdown_table(["piece", "us"], times),
            "## Operations of a router's forward pass, each at least one kernel on a GPU\n",
            markdown_table(["router", "operations"], counts),
        ]
    )


def _verdict(samples: dict[str, Samples], size: LayerSize, *, is_cpu: bool) -> str:
    claim = f"pools cost at most {TARGET:.0%} of the layer on a CPU at d=1024, E=64"
    if not is_cpu or any(getattr(size, name) != value for name, value in TARGET_SIZE.items()):
        return f"not judged: {claim} (this is another layer)"
    times = ratio(samples[SAME_CHOICES].total, samples[STOCK].total)
    verdict = judge(times, at_most=1 + TARGET)
    return f"{verdict}: {claim}; {times.median - 1:.2%} [{times.low - 1:.2%}, {times.high - 1:.2%}]"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
