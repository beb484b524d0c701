"""Time a step: on a CPU, on a GPU, and on a GPU without host time, as replays of CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

L2_BYTES = 256 << 20
"""Read before every timed step on a GPU: more than any level 2 cache, so inputs come from memory as in training. Read
and not written, or what is timed would first write that back."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a contender: a forward pass and the backward pass of what it returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A step as CUDA graphs: what the GPU takes, without the host that launches it."""

    forward: Callable[[], Any]
    total: Callable[[], Any]
    """Forward and backward in one graph."""


def capture(call: Callable[[], Any], *, prepare: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    """Capture a call as a CUDA graph and return what replays it.

    Args:
        call: launches kernels on tensors that stay where they are; called twice before, to warm up.
        prepare: called once on the capture's stream: a backward pass runs on the stream of its forward pass.

    Raises:
        RuntimeError: it cannot be captured, because it waits for the device for instance.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        prepare()
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    finally:
        # a capture that fails leaves its stream the current one
        torch.cuda.set_stream(before)
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, _kept_alive: Callable[[], Any]) -> None:
    graph.replay()


def replay_of(step: Step) -> Replay:
    """The step captured; raises as `capture` does."""
    forward = capture(step.forward)
    return Replay(forward=forward, total=capture(lambda: step.backward(step.forward())))


def time_call(call: Callable[[], Any], *, device: torch.device) -> float:
    """Seconds of one call that starts with a cold level 2 cache on a GPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    _flush()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_on_cpu(step: Step) -> tuple[float, float]:
    """Seconds of the forward pass, and of both."""
    start = time.perf_counter()
    state = step.forward()
    middle = time.perf_counter()
    step.backward(state)
    return middle - start, time.perf_counter() - start


def time_on_gpu(step: Step | Replay) -> tuple[float, float]:
    """Seconds of the forward pass, and of both, with a cold level 2 cache before."""
    if isinstance(step, Replay):
        device = torch.device("cuda")
        return time_call(step.forward, device=device), time_call(step.total, device=device)
    _flush()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    state = step.forward()
    middle.record()
    step.backward(state)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3


def _flush() -> None:
    """Also keeps the GPU busy while the first launches are queued."""
    _flush_buffer().sum()


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(L2_BYTES // 4, device="cuda")
