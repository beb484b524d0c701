"""The floating-point operations of a training step of bench_model.py's models, and the peak of a GPU."""

from __future__ import annotations

from models import Batch, ModelSize

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}
"""Part of a GPU's name -> dense bf16 TFLOP/s of its data sheet; the first that fits counts."""


def peak_flops(gpu_name: str) -> float | None:
    """Dense bf16 operations a second of this GPU; None if not known."""
    found = (tflops for part, tflops in PEAK_TFLOPS.items() if part in gpu_name)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def step_flops(size: ModelSize, batch: Batch) -> int:
    """Floating point operations of forward and backward: matrix products of active weights, attention in documents.

    A weight costs 2 operations a token forward and 4 backward. Causal attention over n tokens has n^2 / 2 pairs, each
    with two products of the width.
    """
    width = size.model_dim
    experts = (size.top_k + 1) * 3 * width * size.ffn_dim
    layer = 4 * width * width + experts + width * size.experts
    weights = size.layers * layer + width * size.vocab
    lengths = batch.bounds.cpu().long().diff()
    pairs = int((lengths * lengths).sum()) // 2
    return 6 * weights * size.tokens + size.layers * 3 * 2 * 2 * pairs * width
