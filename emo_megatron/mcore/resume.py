"""Runs that go on: from a checkpoint, with the pools it was trained with; or after a failure (--inprocess-restart).

Megatron destroys its parsed flags between attempts in one process, so each one prepares and starts anew, with nothing
left of the attempt that failed. The first prepares before the restarts begin: flags that are refused end the run.
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
    """The pools that the checkpoint in `--load` was trained with; off if its flags know no pools.

    Args:
        args: Megatron's parsed flags, left as they are. The checkpoint is read by Megatron's own reader.

    Returns:
        None where there is no checkpoint, or none with the flags of its run.
    """
    # it tells every flag it would set, none of which is wanted here; and it exits where it cannot read, saying why
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
    """Refuse to resume `run`, which had the stored pools, with others; `name_of` says a field in the host's words."""
    names = [field.name for field in dataclasses.fields(PoolConfig)]
    if asked.is_on and not stored.is_on:
        # the run had no pools, and so none of the other fields
        names = ["pool_min"]
    differing = [
        f"  - {name_of(name)} was {getattr(stored, name)!r} and is {getattr(asked, name)!r}"
        for name in names
        if name not in MAY_DIFFER and getattr(stored, name) != getattr(asked, name)
    ]
    if differing:
        raise ValueError("\n".join([f"the run in {run} had other document pools:", *differing, remedy]))


def check_resume(pool: PoolConfig, args: argparse.Namespace) -> None:
    """Refuse to resume a run with other pools than it had. Fine-tuning starts a new run and may have its own."""
    if args.load is None or args.finetune or args.override_pool_config:
        return
    stored = stored_pool_config(args)
    if stored is not None:
        remedy = (
            "Give the same flags; or --override-pool-config to go on with these from here; or --finetune to start a "
            "new run from its weights."
        )
        require_same_pools(stored, pool, run=f"--load {args.load}", remedy=remedy)


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
    inprocess = importlib.import_module(f"{RESTARTS}.inprocess")
    attempt.__annotations__ = {"wrapper": inprocess.CallWrapper}
    restarting, store = maybe_wrap_for_inprocess_restart(attempt)
    restarting(store, None)


def forget_attempt() -> None:
    """Forget what this process keeps of a training run outside its model."""
    CLOCK.consumed_samples = None
    router_documents.forget()
    # what the failed step has recorded would be in the first log of the next attempt
    MTPLossLoggingHelper.tracker.clear()
    router.tell_backend.cache_clear()
