"""In-process restart of one process, whose first attempt fails in its third step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

FAILS_IN_STEP = 3


class _Ignored:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


class _Finalize(_Ignored):
    def __call__(self) -> None:
        self.options["fn"]()


class Compose(_Ignored):
    def __call__(self) -> None:
        for function in self.arguments:
            function()


class CallWrapper:
    iteration = 0


class Fault(Exception):
    pass


class Wrapper:
    def __init__(self, *, finalize: Callable[[], None], **_: Any) -> None:
        self.finalize = finalize

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # as the extension does, by the type of the argument
        names = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if issubclass(CallWrapper, parameter.annotation)
        ]

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            call = CallWrapper()
            _fail_in_step(call)
            while True:
                bound = inspect.signature(function).bind(*arguments, **options)
                bound.arguments |= dict.fromkeys(names, call)
                try:
                    return function(*bound.args, **bound.kwargs)
                except Fault:
                    torch.distributed.destroy_process_group()
                    self.finalize()
                    call.iteration += 1

        return wrapped


def _fail_in_step(call: CallWrapper) -> None:
    from megatron.training import training

    step, calls = training.train_step, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(call.iteration)
        if calls == [0] * FAILS_IN_STEP:
            raise Fault
        return step(*arguments, **options)

    training.train_step = failing


rank_assignment = SimpleNamespace(Layer=_Ignored, Tree=_Ignored, LayerFlag=SimpleNamespace(RESERVE=None))
finalize = SimpleNamespace(ThreadedFinalize=_Finalize)
initialize = SimpleNamespace(RetryController=_Ignored)
nested_restarter = SimpleNamespace(
    NestedRestarterHandlingCompleted=_Ignored,
    NestedRestarterHandlingStarting=_Ignored,
    NestedRestarterFinalized=_Ignored,
    NestedRestarterAborted=_Ignored,
)
abort = SimpleNamespace(Abort=_Ignored, AbortTransformerEngine=_Ignored, AbortTorchDistributed=_Ignored)
state = SimpleNamespace(FrozenState=_Ignored)
health_check = SimpleNamespace(CudaHealthCheck=_Ignored)
