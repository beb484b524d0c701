"""What a checkpoint says of its document pools, and the check that a resumed run goes on with the same."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

from megatron.training.checkpointing import load_args_from_checkpoint

from emo_megatron.config import PoolConfig, flag

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


def differences(stored: PoolConfig, asked: PoolConfig, *, name_of: Callable[[str], str]) -> list[str]:
    """A line for each field in which a run to resume had other pools; `name_of` says a field in the host's words."""
    names = [field.name for field in dataclasses.fields(PoolConfig)]
    if asked.is_on and not stored.is_on:
        # the run had no pools, and so none of the other fields
        names = ["pool_min"]
    return [
        f"  - {name_of(name)} was {getattr(stored, name)!r} and is {getattr(asked, name)!r}"
        for name in names
        if name not in MAY_DIFFER and getattr(stored, name) != getattr(asked, name)
    ]


def check_resume(pool: PoolConfig, args: argparse.Namespace) -> None:
    """Refuse to resume a run with other pools than it had. Fine-tuning starts a new run and may have its own.

    Args:
        pool: the method this run asks for.
        args: Megatron's parsed flags, with `override_pool_config`.
    """
    if args.load is None or args.finetune or args.override_pool_config:
        return
    stored = stored_pool_config(args)
    if stored is None:
        return
    if differing := differences(stored, pool, name_of=flag):
        raise ValueError(
            f"the run in --load {args.load} had other document pools:\n"
            + "\n".join(differing)
            + "\nGive the same flags; or --override-pool-config to go on with these from here; or --finetune to "
            "start a new run from its weights."
        )
