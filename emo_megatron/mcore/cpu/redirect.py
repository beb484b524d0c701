"""CPU versions of torch.cuda, of tensor methods, of collectives, and of Megatron's random states and optimizer."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode


def redirect() -> TorchFunctionMode:
    """Redirect this process to the CPU for the rest of its life. The returned mode is already active."""
    _redirect_cuda_module()
    _redirect_tensors_and_modules()
    _redirect_collectives()
    _redirect_megatron()
    mode = _CudaDevicesToCpu()
    mode.__enter__()
    _keep_in_backward(mode)
    return mode


class _Done:
    """Base class of streams and events on a CPU: all their work is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream(_Done):
    cuda_stream = 0

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Event:
        return _Event()


class _Event(_Done):
    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _CudaDevicesToCpu(TorchFunctionMode):
    """Creates tensors for a CUDA device on the CPU, and reports the types of CPU tensors as CUDA types."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            # pinned memory needs a CUDA device
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if func is torch.Tensor.to and kwargs.get("non_blocking") and args[1:2] == ("cpu",):
            # with a GPU this call copies; asynchronous checkpoints are written from the copy while weights change
            kwargs["copy"] = True
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # gradient clipping asserts the type "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _keep_in_backward(mode: TorchFunctionMode) -> None:
    """Keep the mode active while autograd runs backward, because activations are recomputed there.

    The mode also handles torch.autograd.backward, and torch switches a mode off while the mode's handler runs.
    """
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_function_stack() > 0:
            return run_backward(*args, **kwargs)
        with mode:
            return run_backward(*args, **kwargs)

    autograd._engine_run_backward = run_backward_in_mode


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _answer(value: Any) -> Callable[..., Any]:
    """A new function that returns `value`; torch's compiler does not accept one function under two names."""
    return lambda *args, **kwargs: value


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda
    answers = {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "synchronize": None,
        "set_device": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "cpu",
        "is_current_stream_capturing": False,
    }
    for name, value in answers.items():
        setattr(cuda, name, _answer(value))
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.get_device_properties = _answer(
        SimpleNamespace(total_memory=8 << 30, major=9, minor=0, name="cpu", multi_processor_count=1)
    )
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    # these must be types, because Megatron uses them in isinstance() when it casts for --bf16 and --fp16
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))


def _redirect_tensors_and_modules() -> None:
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = tensor.pin_memory = module.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = _answer(None)
    accelerator: Any = torch.accelerator
    accelerator.is_available = _answer(False)
    accelerator.current_accelerator = _answer(None)
    optimizer: Any = torch.optim.Optimizer
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(optimizer, check):
            setattr(optimizer, check, _answer(None))


def _redirect_collectives() -> None:
    """Add what NCCL supports and gloo does not: split sizes as tensors, averages, parts of different lengths."""
    all_to_all_single, all_reduce = dist.all_to_all_single, dist.all_reduce
    all_gather = dist.all_gather

    def all_to_all_with_lists(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), group, async_op
        )

    def all_reduce_with_average(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op != dist.ReduceOp.AVG:
            return all_reduce(tensor, op, group, async_op)
        # divide first, so that an asynchronous sum is the average when it completes
        tensor.div_(dist.get_world_size(group))
        return all_reduce(tensor, dist.ReduceOp.SUM, group, async_op)

    def all_gather_of_any_length(
        outputs: list[Tensor], input: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        longest = max(len(output) for output in outputs) if input.dim() else 0
        if async_op or all(len(output) == longest for output in outputs if input.dim()):
            return all_gather(outputs, input, group, async_op)
        padded = input.new_zeros(longest, *input.shape[1:])
        padded[: len(input)] = input
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group)
        for output, part in zip(outputs, gathered, strict=True):
            output.copy_(part[: len(output)])
        return None

    def reduce_scatter_of_any_length(
        output: Tensor, inputs: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> None:
        if async_op:
            raise NotImplementedError("reduce_scatter on a CPU must be synchronous; got async_op=True")
        whole = torch.cat([part.reshape(-1) for part in inputs])
        all_reduce_with_average(whole, op, group)
        rank = dist.get_rank(group)
        output.copy_(whole.split([part.numel() for part in inputs])[rank].view_as(output))

    module: Any = dist
    module.all_to_all_single = all_to_all_with_lists
    module.all_reduce = all_reduce_with_average
    module.all_gather = all_gather_of_any_length
    module.reduce_scatter = reduce_scatter_of_any_length


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if hasattr(sizes, "tolist") else sizes


def _redirect_megatron() -> None:
    import megatron.core.tensor_parallel.random as random

    from emo_megatron.mcore.compat import use_compiled_index_builder

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    use_compiled_index_builder()
    _repair_optimizer()


def _repair_optimizer() -> None:
    """Let the distributed optimizer load checkpoints with torch's AdamW, without Apex and Transformer Engine.

    Megatron-Core 0.19 has this combination for machines without both packages, but loading has three faults. Loading
    reads the optimizer step from states that exist only after a first step, copies into leaf tensors that require
    gradients, and uses the step of those first states instead of the stored step. With this repair a resumed run equals
    an uninterrupted run bit for bit.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict
    load_state_dict = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict_with_states(self: Any) -> Any:
        groups = self.optimizer.param_groups
        if not self.optimizer.state and any(group["params"] for group in groups):
            rates = [group["lr"] for group in groups]
            for group in groups:
                # the learning rate of 0 keeps this step from changing weights; there are no gradients
                group["lr"] = 0.0
            self._init_optimizer_states_with_dummy_values()
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            for values in self.optimizer.state.values():
                values["step"].zero_()
        return state_dict(self)

    def load_state_dict_whole(self: Any, state: Any) -> None:
        with torch.no_grad():
            load_state_dict(self, state)
        if self.ddp_config.use_megatron_fsdp:
            # a Megatron-FSDP checkpoint contains the step of every parameter and needs no repair
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in self.optimizer.state.get(parameter, {}):
                    # one tensor per parameter, because every parameter would advance a shared tensor
                    step = torch.tensor(float(group["step"]))
                    self.optimizer.state[parameter]["step"] = step

    def set_states_without_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None} | tensors)

    DistributedOptimizer.state_dict = state_dict_with_states
    DistributedOptimizer.load_state_dict = load_state_dict_whole
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_without_step
