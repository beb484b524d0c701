"""--inprocess-restart: training that starts over in the same processes, with nothing left of the attempt that failed.

Megatron destroys its parsed flags between attempts, so each one prepares and starts anew. The first prepares before the
restarts begin: flags that are refused end the run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from emo_megatron.mcore import backend, router_documents
from emo_megatron.mcore.compat import training_args
from emo_megatron.mcore.context import CLOCK

EXTENSION = "nvidia_resiliency_ext"


def problems_with_restarts(args: argparse.Namespace) -> list[str]:
    """Why --inprocess-restart cannot work here: without the package behind it Megatron would go on without restarts."""
    if not args.inprocess_restart:
        return []
    problems = []
    if importlib.util.find_spec(EXTENSION) is None:
        problems.append(
            f"--inprocess-restart needs the package {EXTENSION}, which is not installed: "
            "pip install nvidia-resiliency-ext, or drop the flag"
        )
    active = args.inprocess_active_world_size
    if active is not None and active != args.world_size:
        problems.append(
            f"--inprocess-active-world-size must be the number of processes, {args.world_size}; got {active}: flags "
            "are parsed before reserve ranks are set aside"
        )
    return problems


def run(prepare: Callable[[], tuple[Any, ...]], start: Callable[..., None]) -> None:
    """`start(*prepare(), store=..., inprocess_call_wrapper=...)`, once more after every failure with the flag.

    Args:
        prepare: parses and checks the flags; they are the first of what it returns.
        start: trains. The keywords are for Megatron's `pretrain`; None without restarts.
    """
    prepared = prepare()
    if not prepared[0].inprocess_restart:
        start(*prepared, store=None, inprocess_call_wrapper=None)
        return
    from megatron.training.inprocess_restart import maybe_wrap_for_inprocess_restart

    def attempt(store: Any, wrapper: Any) -> None:
        forget_attempt()
        is_first = training_args() is prepared[0]
        start(*(prepared if is_first else prepare()), store=store, inprocess_call_wrapper=wrapper)

    # The extension fills every argument that is annotated with this class or a base of it. Megatron's own pretrain has
    # no such argument: without it a later attempt meets in the store what the failed one left there.
    inprocess = importlib.import_module(f"{EXTENSION}.inprocess")
    attempt.__annotations__ = {"wrapper": inprocess.CallWrapper}
    restarting, store = maybe_wrap_for_inprocess_restart(attempt)
    restarting(store, None)


def forget_attempt() -> None:
    """Forget what this process keeps of a training run outside its model."""
    CLOCK.consumed_samples = None
    router_documents.forget()
    # what the failed step has recorded would be in the first log of the next attempt
    MTPLossLoggingHelper.tracker.clear()
    backend._tell.cache_clear()
