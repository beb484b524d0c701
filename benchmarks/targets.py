"""The times of one size of bench_routing.py, and whether they meet the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from routers import Shape, bytes_moved
from timing import Estimate, Samples, judge, ratio

NATIVE, REFERENCE, GROUPED = "native ops", "reference ops", "native ops with groups"
STOCK, FUSED, LOOP = "Megatron, no pools", "Transformer Engine, no pools", "loop over documents"
MODES = {"forward": False, "forward + backward": True}
TRAINING = "forward + backward"
TARGET_THREADS = 2
"""Threads the CPU's targets are meant for."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One size."""

    shape: Shape
    samples: dict[str, Samples]
    """Of the routers, as replays of CUDA graphs on a GPU."""
    eager: dict[str, Samples] = field(default_factory=dict)
    """On a GPU, of the same without graphs, which is the host's time wherever the host is slower."""

    def values(self, router: str, mode: str, *, is_eager: bool = False) -> list[float]:
        """Seconds of every round."""
        samples = (self.eager if is_eager else self.samples)[router]
        return samples.total if MODES[mode] else samples.forward

    def times_native(self, router: str, mode: str) -> Estimate:
        """How many times as long a router takes as the compiled ops."""
        return ratio(self.values(router, mode), self.values(NATIVE, mode))

    def floor(self, mode: str, bandwidth: float) -> float:
        """Seconds that moving the compiled ops' bytes takes, at so many bytes a second."""
        return bytes_moved(self.shape, with_backward=MODES[mode]) / bandwidth


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on the compiled ops' time, forward and backward, relative to a router."""

    shape: Shape
    against: str
    factor: float
    """How many times as long the router must take at least."""

    def __str__(self) -> str:
        return f"{self.shape}: {self.against} takes at least {self.factor} x as long"

    def verdict(self, result: Result | None) -> str:
        """Met, missed or undecided, and by what; or that it was not run."""
        if result is None or not {NATIVE, self.against} <= result.samples.keys():
            return f"not judged: {self} (not run)"
        reached = result.times_native(self.against, TRAINING)
        fastest = min(result.values(self.against, TRAINING)) / min(result.values(NATIVE, TRAINING))
        verdict = judge(reached, at_least=self.factor)
        return f"{verdict}: {self}; {reached}, fastest rounds {fastest:.2f}"


def _targets(num_tokens: int, against: str, *, long: float, short: float) -> list[Target]:
    """The factors for documents of 512 and of 32 tokens; 128 experts, top-8."""
    return [
        Target(
            shape=Shape(num_tokens=num_tokens, num_experts=128, top_k=8, num_documents=num_tokens // document_tokens),
            against=against,
            factor=factor,
        )
        for document_tokens, factor in ((512, long), (32, short))
    ]


TARGETS = {
    "cpu": [*_targets(8192, LOOP, long=2.5, short=6.0), *_targets(8192, STOCK, long=3.0, short=3.0)],
    "cuda": [
        *_targets(1024, STOCK, long=1.0, short=1.0),
        *_targets(8192, STOCK, long=1.0, short=1.0),
        *_targets(65536, STOCK, long=1.0, short=1.0),
        *_targets(65536, STOCK, long=4.0, short=4.0),
    ],
}


KERNELS = Shape(num_tokens=65536, num_experts=128, top_k=8, num_documents=128)
KERNELS_FACTOR = 2.0
"""The routing kernels' times, added up, at most so many times their floor: float32, replays of graphs, a GPU's only."""


def kernels_verdict(floors: Estimate | None, *, device: torch.device) -> str:
    """Whether the routing kernels are near their floor; `floors` says how many times they take it, None: not run."""
    target = f"routing kernels at {KERNELS}, float32: at most {KERNELS_FACTOR} x the bandwidth floor"
    if device.type != "cuda":
        return f"not measured: {target} (a GPU's target)"
    if floors is None:
        return f"not judged: {target} (gpu/kernels.py times the kernels one by one)"
    return f"{judge(floors, at_most=KERNELS_FACTOR)}: {target}; {floors}"


def verdicts(results: Sequence[Result], *, device: torch.device, threads: int) -> Iterator[str]:
    """One line a target of the device: met, missed, undecided, or why it was not judged."""
    found = {result.shape: result for result in results}
    for target in TARGETS[device.type]:
        if device.type == "cpu" and threads != TARGET_THREADS:
            yield f"not judged: {target} (a target with {TARGET_THREADS} threads)"
        else:
            yield target.verdict(found.get(target.shape))
    # of kernels.py, which times them one by one
    yield kernels_verdict(None, device=device)
