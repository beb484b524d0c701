"""Megatron on the CPU: when it is active, and that what it bridges is right."""

from __future__ import annotations

import pytest
import torch

from emo_megatron.mcore import cpu


@pytest.fixture
def has_gpu(monkeypatch):
    def pretend(answer: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: answer)

    return pretend


@pytest.mark.parametrize(
    ("device", "gpu", "wanted"),
    [("", False, True), ("", True, False), ("cpu", True, True), ("cuda", False, False), ("cuda", True, False)],
)
def test_it_is_wanted_without_a_gpu_or_on_request(monkeypatch, has_gpu, device, gpu, wanted):
    monkeypatch.setenv("EMO_DEVICE", device)
    has_gpu(gpu)
    assert cpu.is_wanted() is wanted


def test_an_unknown_device_is_refused(monkeypatch):
    monkeypatch.setenv("EMO_DEVICE", "tpu")
    with pytest.raises(ValueError, match="EMO_DEVICE must be cpu, cuda or unset; got 'tpu'"):
        cpu.is_wanted()


def test_a_process_with_a_gpu_is_left_alone(monkeypatch, has_gpu):
    monkeypatch.delenv("EMO_DEVICE", raising=False)
    has_gpu(True)
    before = torch.cuda.current_device
    assert cpu.activate() is False
    assert torch.cuda.current_device is before
    assert cpu.with_cpu_flags(["--x"]) == ["--x"]


def _collectives():
    import torch.distributed as dist

    rank = dist.get_rank()
    average = torch.tensor([float(rank), 4.0])
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    asynchronous = torch.tensor([2.0 * rank])
    dist.all_reduce(asynchronous, op=dist.ReduceOp.AVG, async_op=True).wait()
    sent = torch.arange(3.0) + 10 * rank
    received = torch.empty(2 if rank == 0 else 4)
    split_in = torch.tensor([1, 2])
    split_out = torch.tensor([1, 1] if rank == 0 else [2, 2])
    dist.all_to_all_single(received, sent, split_out, split_in)
    return average.tolist(), asynchronous.tolist(), received.tolist()


def test_averages_and_tensor_splits_work_over_gloo(ranks):
    first, second = ranks(2).run(_collectives)
    assert first == ([0.5, 4.0], [1.0], [0.0, 10.0])
    assert second == ([0.5, 4.0], [1.0], [1.0, 2.0, 11.0, 12.0])


def _devices():
    inside = torch.ones(2, device="cuda")
    moved = inside.to(torch.device("cuda", 0))
    weight = torch.nn.Linear(2, 2).cuda().weight
    seen = []

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen.append(torch.ones(1, device="cuda").device.type)
            return gradient * 2

    x = torch.ones(1, requires_grad=True)
    Recompute.apply(x).sum().backward()
    torch.autograd.grad(Recompute.apply(x).sum(), [x])
    return [inside.device.type, moved.device.type, weight.device.type, *seen]


def test_cuda_devices_are_the_cpu_in_forward_and_backward(ranks):
    assert ranks(1).run(_devices)[0] == ["cpu"] * 5


def _casts():
    from megatron.core.transformer.module import float16_to_fp32, fp32_to_float16

    inputs = (torch.ones(1), torch.ones(1, dtype=torch.int64))
    halves = [fp32_to_float16(inputs, cast) for cast in (torch.Tensor.half, torch.Tensor.bfloat16)]
    return [[t.dtype for t in half] for half in halves], [t.dtype for half in halves for t in float16_to_fp32(half)]


def test_megatron_casts_to_half_precision_and_back(ranks):
    halves, back = ranks(1).run(_casts)[0]
    assert halves == [[torch.float16, torch.int64], [torch.bfloat16, torch.int64]]
    assert back == [torch.float32, torch.int64] * 2


def _staged():
    weights = torch.zeros(2)
    staged = weights.to("cpu", non_blocking=True)
    same = weights.to("cpu")
    weights += 1
    return staged.tolist(), same.tolist()


def test_a_checkpoint_that_is_written_later_holds_the_weights_of_its_step(ranks):
    assert ranks(1).run(_staged)[0] == ([0.0, 0.0], [1.0, 1.0])
