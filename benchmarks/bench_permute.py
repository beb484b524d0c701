"""How much time do the permutation of tokens to experts and its inverse take, without communication between ranks?

Megatron's unfused permute and unpermute are compared with the compiled layout, copies and sums, and with the reference
implementation in plain PyTorch, in turns in one process, forward and backward. Timing starts only after tokens,
probabilities, outputs and gradients are equal. The floor of a size is the time to copy the bytes of that size, at the
copy bandwidth of the same run.

    python benchmarks/bench_permute.py --quick     # two sizes, seconds
    python benchmarks/bench_permute.py             # all sizes, about two minutes on two cores
    python benchmarks/bench_permute.py --device cuda --width 2048 --tokens 16384 65536
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from timing import (
    RESULTS,
    Device,
    Ended,
    Rounds,
    Samples,
    Step,
    copy_bandwidth,
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
from torch import Tensor
from tqdm import tqdm

from emo_megatron import ops
from emo_megatron.ops import dispatch

NATIVE, REFERENCE, STOCK = "native ops", "reference ops", "Megatron, unfused"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.0**-6}
"""Of a tensor's norm; in bfloat16 Megatron rounds after every addition."""
Mode = Literal["forward", "total"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the permutation of tokens to experts and back."""

    quick: bool = False
    """Two sizes, few rounds."""
    device: Device = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    threads: int = 2
    """CPU threads."""
    tokens: tuple[int, ...] = ()
    """Tokens per micro-batch. Default: 512 4096. Sizes given here or by --width have 128 experts, top-8."""
    width: tuple[int, ...] = ()
    """Width of the model. Default: 128 1024."""
    seconds: float = 1.0
    """Seconds to spend on each size, at least 21 rounds."""
    output: Path = field(default=RESULTS)
    """Folder of the results: a CSV and a page, both named after the hardware."""

    def __post_init__(self) -> None:
        for name in ("tokens", "width"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")

    def sizes(self) -> Iterator[Size]:
        """Every size to run."""
        is_given = bool(self.tokens or self.width)
        if self.quick and not is_given:
            yield Size(tokens=1024, experts=32, top_k=4, width=256, dtype="float32")
            yield Size(tokens=512, experts=64, top_k=8, width=128, dtype="bfloat16")
            return
        shapes = [(128, 8)] if is_given else [(64, 2), (64, 8), (128, 8), (512, 8)]
        for dtype, tokens, (experts, top_k), width in product(
            DTYPES, self.tokens or (512, 4096), shapes, self.width or (128, 1024)
        ):
            yield Size(tokens=tokens, experts=experts, top_k=top_k, width=width, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one case."""

    tokens: int
    experts: int
    top_k: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"T={self.tokens} E={self.experts} K={self.top_k} H={self.width} {self.dtype}"

    def bytes_moved(self, mode: Mode) -> int:
        """What must be read and written if every tensor moves once each way; backward is the same way back."""
        pairs = self.tokens * self.top_k
        places = self.tokens * self.experts
        rows = 2 * DTYPES[self.dtype].itemsize * self.width * (self.tokens + pairs)
        # the map and the probabilities of the pairs; their gradients go into a whole [T, E]
        forward = rows + places + 2 * 4 * pairs
        return forward if mode == "forward" else forward + rows + 4 * pairs + 4 * places


@dataclass(frozen=True, kw_only=True)
class Case:
    """Input of one step, the same for all."""

    size: Size
    tokens_TH: Tensor
    probs_TE: Tensor
    routing_map_TE: Tensor
    upstream_TH: Tensor


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """What a permutation and its inverse give."""

    leaves: tuple[Tensor, Tensor]
    """Tokens and probabilities."""
    rows_PH: Tensor
    probs_P: Tensor
    output_TH: Tensor


Permute = Callable[[Tensor, Tensor, Case], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]


def main(options: Options) -> list[Path]:
    """Check, time, write; returns the files.

    Raises:
        ValueError: the compiled ops are missing, or they do not permute as Megatron does.
    """
    device = pick_device(options.device)
    if reason := ops.why_not_native(device.type):
        raise ValueError(f"there are no compiled ops to time: {reason}")
    torch.set_num_threads(options.threads)
    metadata = describe_machine(device, threads=options.threads)
    bandwidth = copy_bandwidth(device)
    metadata["copy bandwidth"] = f"{bandwidth / 1e9:.0f} GB/s"
    contenders: dict[str, Permute] = {NATIVE: _own("native"), REFERENCE: _own("reference"), STOCK: _stock}
    results: dict[Size, dict[str, Samples]] = {}
    sizes = list(options.sizes())
    fewest, seconds = (5, 0.2) if options.quick else (21, options.seconds)
    rounds = Rounds(fewest=fewest, most=100, seconds=seconds)
    progress = tqdm(sizes, desc="sizes", disable=None)
    try:
        for size in progress:
            progress.set_postfix_str(str(size))
            case = _make_case(size, device)
            _check(contenders, case)
            steps = {name: _step(permute, case) for name, permute in contenders.items()}
            results[size] = interleave(steps, device=device, rounds=rounds)
    except Ended:
        if not results:
            raise
        metadata["ended"] = f"after {len(results)} of {len(sizes)} sizes"
    page = _page(results, metadata, bandwidth)
    print(page)
    name = result_name("permute", device=device, is_quick=options.quick)
    return write_results(options.output, name, rows=list(_rows(results, bandwidth)), page=page)


def _own(backend: ops.Backend) -> Permute:
    def permute(tokens_TH: Tensor, probs_TE: Tensor, case: Case) -> Any:
        num_tokens, num_experts = probs_TE.shape
        # the host needs the counts, and knows them here; both make them
        dispatch.count_sends(case.routing_map_TE, num_ranks=1, backend=backend)
        send = dispatch.plan_send(
            case.routing_map_TE,
            num_ranks=1,
            num_rows=num_tokens,
            num_pairs=num_tokens * case.size.top_k,
            backend=backend,
        )
        receive = dispatch.plan_receive(send.codes_P, num_rows=num_tokens, num_experts=num_experts, backend=backend)
        rows_PH = dispatch.copy_rows(tokens_TH, fanout=receive.pairs, backend=backend)
        probs_P = probs_TE.flatten().gather(0, send.places_P).gather(0, receive.order_P)
        return (rows_PH, probs_P, lambda rows_PH: dispatch.sum_rows(rows_PH, fanout=receive.pairs, backend=backend))

    return permute


def _stock(tokens_TH: Tensor, probs_TE: Tensor, case: Case) -> Any:
    from megatron.core.transformer.moe import moe_utils

    num_pairs = len(tokens_TH) * case.size.top_k
    case.routing_map_TE.sum(dim=0)
    rows_PH, probs_P, order, *_ = moe_utils.permute(tokens_TH, case.routing_map_TE, probs_TE, num_out_tokens=num_pairs)
    return rows_PH, probs_P, lambda rows_PH: moe_utils.unpermute(rows_PH, order, tokens_TH.shape)


def _step(permute: Permute, case: Case) -> Step:
    def forward() -> Permuted:
        leaves = (case.tokens_TH.detach().requires_grad_(), case.probs_TE.detach().requires_grad_())
        rows_PH, probs_P, unpermute = permute(*leaves, case)
        return Permuted(leaves=leaves, rows_PH=rows_PH, probs_P=probs_P, output_TH=unpermute(rows_PH))

    return Step(forward=forward, backward=lambda permuted: _gradients(permuted, case))


def _gradients(permuted: Permuted, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        [permuted.output_TH, permuted.probs_P], permuted.leaves, [case.upstream_TH, torch.ones_like(permuted.probs_P)]
    )


def _make_case(size: Size, device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.rand(size.tokens, size.experts, generator=generator)
    chosen_TK = scores_TE.topk(size.top_k).indices
    routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
    numbers_TH, upstream_TH = (
        torch.randn(size.tokens, size.width, generator=generator).to(DTYPES[size.dtype]) for _ in range(2)
    )
    return Case(
        size=size,
        tokens_TH=numbers_TH.to(device),
        probs_TE=(scores_TE * routing_map_TE).to(device),
        routing_map_TE=routing_map_TE.to(device),
        upstream_TH=upstream_TH.to(device),
    )


def _check(contenders: dict[str, Permute], case: Case) -> None:
    wanted = _results(contenders[STOCK], case)
    for name, permute in contenders.items():
        # one at a time: rows are large
        for what, got in _results(permute, case).items():
            want = wanted[what].float()
            error = float((got.float() - want).norm() / want.norm())
            if not error < TOLERANCE[case.size.dtype]:
                raise ValueError(
                    f"{name}: {what} must equal Megatron's, they differ by {error:.1e} ({case.size}); "
                    "nothing is reported"
                )


def _results(permute: Permute, case: Case) -> dict[str, Tensor]:
    permuted = _step(permute, case).forward()
    tokens_gradient, probs_gradient = _gradients(permuted, case)
    return {
        "rows": permuted.rows_PH.detach(),
        "probabilities": permuted.probs_P.detach(),
        "output": permuted.output_TH.detach(),
        "tokens' gradient": tokens_gradient,
        "probabilities' gradient": probs_gradient,
    }


def _rows(results: dict[Size, dict[str, Samples]], bandwidth: float) -> Iterator[dict[str, Any]]:
    modes: tuple[Mode, ...] = ("forward", "total")
    for (size, found), mode in product(results.items(), modes):
        for name, samples in found.items():
            values = getattr(samples, mode)
            time = estimate(values).scaled(1e6)
            times_native = ratio(values, getattr(found[NATIVE], mode))
            yield (
                asdict(size)
                | {"contender": name, "mode": mode, "median_us": round(time.median, 2)}
                | {"low_us": round(time.low, 2), "high_us": round(time.high, 2)}
                | {f"times_native_{k}": round(v, 3) for k, v in asdict(times_native).items()}
                | {"native_floor_us": round(size.bytes_moved(mode) / bandwidth * 1e6, 2)}
                | {"rounds": len(values)}
            )


def _page(results: dict[Size, dict[str, Samples]], metadata: dict[str, str], bandwidth: float) -> str:
    modes: tuple[tuple[Mode, str], ...] = (("forward", "Forward"), ("total", "Forward + backward"))
    parts = ["# Permutation of tokens to experts, and back\n"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n")
    parts.append(
        "Milliseconds of the compiled ops, then how many times as long the others take: medians with 95 % intervals. "
        "Floor: what the bytes that must move take at the copy bandwidth; what fits a cache can be faster.\n"
    )
    parts.append("## Target\n")
    parts.append("\n".join(f"- {_verdict(results, mode, title)}" for mode, title in modes) + "\n")
    for mode, title in modes:
        head = ["size", "native ops, ms", f"{REFERENCE}, x", f"{STOCK}, x", "floor, ms", "floors"]
        table = []
        for size, found in results.items():
            native = getattr(found[NATIVE], mode)
            ratios = [str(ratio(getattr(found[n], mode), native)) for n in (REFERENCE, STOCK)]
            floor = size.bytes_moved(mode) / bandwidth
            floors = [f"{floor * 1e3:.3f}", str(estimate(native).scaled(1 / floor))]
            table.append([str(size), f"{estimate(native).median * 1e3:.3f}", *ratios, *floors])
        parts.append(f"## {title}\n")
        parts.append(markdown_table(head, table))
    return "\n".join(parts)


def _verdict(results: dict[Size, dict[str, Samples]], mode: Mode, title: str) -> str:
    """Of all sizes, by the interval that reaches lowest."""
    against = {
        size: ratio(getattr(found[STOCK], mode), getattr(found[NATIVE], mode)) for size, found in results.items()
    }
    nearest = min(against, key=lambda size: against[size].low)
    return (
        f"{judge(against[nearest], at_least=1.0)}: {title.lower()}, never slower than Megatron's unfused permutation; "
        f"it takes {against[nearest]} x as long where it may come nearest, {nearest}"
    )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
