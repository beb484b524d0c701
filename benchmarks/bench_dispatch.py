"""How much time does it save to send each token only once to a rank, over expert-parallel ranks?

One Megatron MoE layer runs with Megatron's `alltoall` dispatcher and with `--pool-dispatcher dedup`, in turns, in the
same processes over gloo. The benchmark times the whole step (dispatch, experts, combine, forward and backward), and
dispatch and combine alone. Timing starts only after outputs and gradients are equal. Experts are small, so that
communication dominates; in other models, the gain of a step depends on the share of the all-to-all in the step.
Routing is uniform, the worst case for `dedup`.

    python benchmarks/bench_dispatch.py --quick     # small, seconds
    python benchmarks/bench_dispatch.py             # d=1024, top-8, 2 and 4 ranks: about two minutes on two cores
"""

from __future__ import annotations

import dataclasses
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from dispatchers import DEDUP, STOCK, Dispatchers, DispatchSize, Traffic
from timing import (
    RESULTS,
    Rounds,
    Samples,
    describe_machine,
    estimate,
    interleave,
    judge,
    markdown_table,
    ratio,
    result_name,
    run_script,
    write_results,
)

TARGET = 1.2
"""Times as fast as Megatron's alltoall, the whole step, at TARGET_SIZE."""
TARGET_SIZE = {"model_dim": 1024, "top_k": 8}
TARGET_FFN = 64
SIZE = DispatchSize(tokens=1024, model_dim=1024, experts=32, ffn_dim=32, top_k=8)
QUICK = DispatchSize(tokens=64, model_dim=64, experts=16, ffn_dim=16, top_k=4)
PARTS = {"whole step": True, "dispatch + combine": False}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the dispatch of tokens over gloo ranks on this machine, in turns."""

    quick: bool = False
    """Small and few rounds, to test that everything runs; the ratio is not meaningful."""
    ranks: tuple[int, ...] = (2, 4)
    """Numbers of expert-parallel ranks, one process each with one thread."""
    tokens: int | None = None
    """Tokens per rank. Default: 1024."""
    model_dim: int | None = None
    """Width of the model. Default: 1024."""
    experts: int | None = None
    """Routed experts. Default: 32."""
    ffn_dim: int | None = None
    """Hidden width of each expert. Default: 32."""
    top_k: int | None = None
    """Experts per token. Default: 8."""
    rounds: int | None = None
    """Number of rounds; each round is one step of both dispatchers. Default: 30, quick 3."""
    output: Path = field(default=RESULTS)
    """Folder of the results: a CSV and a page, both named after the hardware."""

    def size(self, default: DispatchSize) -> DispatchSize:
        """The layer: what was asked for, else the default.

        Raises:
            ValueError: the number of experts is no multiple of the number of ranks, or is below top-k.
        """
        names = [f.name for f in dataclasses.fields(DispatchSize)]
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        size = dataclasses.replace(default, **asked)
        for ranks in self.ranks:
            if size.experts % ranks:
                raise ValueError(
                    f"--experts must be a multiple of --ranks; got {size.experts} experts and {ranks} ranks"
                )
        if size.top_k > size.experts:
            raise ValueError(f"--top-k must be at most --experts ({size.experts}); got {size.top_k}")
        return size


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Measurements of one run, taken on rank 0, whose steps end when the steps of all ranks have ended."""

    ranks: int
    samples: dict[str, dict[str, Samples]]
    """Part of the step -> dispatcher -> seconds."""
    traffic: dict[str, Traffic]


def main(options: Options) -> list[Path]:
    """Check, time, write; returns the files.

    Raises:
        ValueError: the dispatchers do not compute the same, or an option is wrong.
    """
    size = options.size(QUICK if options.quick else SIZE)
    rounds = options.rounds or (3 if options.quick else 30)
    device = torch.device("cpu")
    metadata = describe_machine(device, threads=1)
    answers = [_measure(size, ranks=ranks, rounds=rounds) for ranks in options.ranks]
    rows = [row for answer in answers for row in _rows(answer, size)]
    page = _page(answers, size, metadata=metadata)
    print(page)
    name = result_name("dispatch", device=device, is_quick=options.quick)
    return write_results(options.output, name, rows=rows, page=page)


def _measure(size: DispatchSize, *, ranks: int, rounds: int) -> Answer:
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_rank, args=(sender, rank, ranks, port, size, rounds), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    sender.close()
    try:
        # first: a process that has something left to send does not end
        answer: Answer | None = receiver.recv()
    except EOFError:
        answer = None
    for process in processes:
        process.join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed or answer is None:
        raise ValueError(f"ranks {failed} of {ranks} failed; their output is above")
    return answer


def _rank(sender: Any, rank: int, ranks: int, port: int, size: DispatchSize, rounds: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        EMO_DEVICE="cpu",
    )
    torch.set_num_threads(1)
    from emo_megatron.mcore import cpu

    cpu.activate()
    torch.distributed.init_process_group("gloo")
    try:
        dispatchers = Dispatchers(size, ranks=ranks)
        dispatchers.check()
        samples = {
            part: interleave(
                dispatchers.steps(with_experts=with_experts),
                device=torch.device("cpu"),
                # as many on every rank, whatever their clocks say
                rounds=Rounds(fewest=rounds, most=rounds, seconds=0.0),
            )
            for part, with_experts in PARTS.items()
        }
        traffic = dispatchers.traffic()
    finally:
        torch.distributed.destroy_process_group()
    if rank == 0:
        sender.send(Answer(ranks=ranks, samples=samples, traffic=traffic))


def _rows(answer: Answer, size: DispatchSize) -> list[dict[str, Any]]:
    rows = []
    for part, found in answer.samples.items():
        for name, times in found.items():
            for mode in ("forward", "total"):
                values, stock = getattr(times, mode), getattr(found[STOCK], mode)
                time, faster = estimate(values), ratio(stock, values)
                rows.append(
                    dataclasses.asdict(size)
                    | {"ranks": answer.ranks, "part": part, "dispatcher": name, "mode": mode}
                    | {"median_ms": round(time.median * 1e3, 2)}
                    | {"low_ms": round(time.low * 1e3, 2), "high_ms": round(time.high * 1e3, 2)}
                    | {"times_as_fast": round(faster.median, 3), "rounds": len(values)}
                    | dataclasses.asdict(answer.traffic[name])
                )
    return rows


def _page(answers: list[Answer], size: DispatchSize, *, metadata: dict[str, str]) -> str:
    parts = ["# Dispatch over expert-parallel ranks\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n")
    parts.append(
        f"The layer: {size}; one thread per rank, all ranks on this machine, gloo, float32. "
        "Medians with 95 % intervals.\n"
    )
    parts.append("## Target\n")
    parts.append("\n".join(f"- {_verdict(answer, size)}" for answer in answers) + "\n")
    table = []
    for answer in answers:
        for part, found in answer.samples.items():
            for name, times in found.items():
                total = estimate(times.total).scaled(1e3)
                faster = ratio(found[STOCK].total, times.total)
                sent = answer.traffic[name]
                name = f"EP{answer.ranks}, {part}, {name}"
                rows = f"{sent.rows / size.tokens:.2f}"
                kilobytes = f"{sent.crossing_bytes / size.tokens / 1e3:.1f}"
                table.append([name, str(total), str(faster), rows, kilobytes])
    parts.append("## Forward + backward\n")
    head = ["what", "ms", "times as fast", "rows per token", "kB per token to other ranks, forward"]
    parts.append(markdown_table(head, table))
    return "\n".join(parts)


def _verdict(answer: Answer, size: DispatchSize) -> str:
    claim = (
        f"EP{answer.ranks}: the whole step is at least {TARGET} times as fast as with Megatron's "
        "alltoall at d=1024, K=8, small experts"
    )
    fits = all(getattr(size, name) == value for name, value in TARGET_SIZE.items())
    if not fits or size.ffn_dim > TARGET_FFN:
        return f"not judged: {claim} (this is another layer)"
    found = answer.samples["whole step"]
    faster = ratio(found[STOCK].total, found[DEDUP].total)
    return f"{judge(faster, at_least=TARGET)}: {claim}; {faster}"


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
