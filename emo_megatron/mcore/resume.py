"""Resumed runs: from a checkpoint, with the pools of its training run; or after a failure (--inprocess-restart).

Megatron destroys its parsed flags between attempts in one process. Each attempt therefore prepares and starts again,
without state of the failed attempt. The first attempt prepares before the restarts begin, so that unsupported flags end
the run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import io
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.training.checkpointing import load_args_from_checkpoint

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore import router, router_documents
from emo_megatron.mcore.combinations import RESTARTS
from emo_megatron.mcore.compat import training_args
from emo_megatron.mcore.context import CLOCK

MAY_DIFFER = ("pool_eval", "pool_check", "pool_cp_partition", "pool_dispatcher")
"""Fields that change neither the model nor its training."""


def stored_pool_config(args: argparse.Namespace) -> PoolConfig | None:
    """The pool options of the run that wrote the checkpoint in `--load`; off if that run had no pool options.

    None if there is no checkpoint, or if the checkpoint lacks its run's flags. Uses Megatron's checkpoint reader.
    """
    # Megatron's reader prints every flag that it would set, which is hidden here; on errors it prints why and exits
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told):
            found = load_args_from_checkpoint(copy.copy(args))
    except SystemExit:
        print(told.getvalue(), flush=True)
        raise
    if not isinstance(found, tuple):
        return None
    stored: dict[str, Any] = {
        field.name: getattr(found[1], field.name, field.default) for field in dataclasses.fields(PoolConfig)
    }
    return PoolConfig(**stored)


def require_same_pools(
    stored: PoolConfig, asked: PoolConfig, *, run: str, remedy: str, name_of: Callable[[str], str] = flag
) -> None:
    """Raise if the pool options `asked` differ from the options `stored` of `run`.

    Args:
        remedy: last line of the error message.
        name_of: maps a field to the option's name in the host.
    """
    names = [field.name for field in dataclasses.fields(PoolConfig)]
    if asked.is_on and not stored.is_on:
        # the stored run had no pools, so its other fields had no effect
        names = ["pool_min"]
    differing = [
        f"  - {name_of(name)} was {getattr(stored, name)!r} and is {getattr(asked, name)!r}"
        for name in names
        if name not in MAY_DIFFER and getattr(stored, name) != getattr(asked, name)
    ]
    if differing:
        raise ValueError("\n".join([f"the run in {run} had different pool options:", *differing, remedy]))


def check_resume(pool: PoolConfig, args: argparse.Namespace) -> None:
    """Raise if a run is resumed with different pool options. Fine-tuning starts a new run, which may differ."""
    if args.load is None or args.finetune or args.override_pool_config:
        return
    stored = stored_pool_config(args)
    if stored is not None:
        remedy = (
            "Give the flags of that run; or --override-pool-config to continue with the new flags; or --finetune to "
            "start a new run from the weights of that run."
        )
        require_same_pools(stored, pool, run=f"--load {args.load}", remedy=remedy)


def run(prepare: Callable[[], tuple[Any, ...]], start: Callable[..., None]) -> None:
    """Call `start(*prepare(), store=..., inprocess_call_wrapper=...)`; with --inprocess-restart again after failures.

    Args:
        prepare: parses and checks the flags, and returns them as the first value.
        start: trains. The keywords are for Megatron's `pretrain`; both are None without --inprocess-restart.
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

    # The extension fills every argument that is annotated with this class or a base of it. Megatron's pretrain lacks
    # such an argument. Without one a later attempt would find entries of the failed attempt in the store.
    inprocess = importlib.import_module(f"{RESTARTS}.inprocess")
    attempt.__annotations__ = {"wrapper": inprocess.CallWrapper}
    restarting, store = maybe_wrap_for_inprocess_restart(attempt)
    restarting(store, None)


def forget_attempt() -> None:
    """Reset the state of a training run that this process keeps outside the model."""
    CLOCK.consumed_samples = None
    router_documents.forget()
    # values recorded by the failed step would appear in the first log of the next attempt
    MTPLossLoggingHelper.tracker.clear()
    router.tell_backend.cache_clear()
