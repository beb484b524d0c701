"""Run a command again in processes of its own: Megatron starts once per process, and wants one for every GPU.

The user calls one command. It calls itself with the same options, alone or under torchrun; each of these processes
knows by `is_rank` that it is to do the work. A job around the command does not matter: its variables are not inherited.
This module is also torchrun for them, because torchrun itself ends with 1, whatever its ranks ended with, after a page
of report:

    python -m emo_megatron.runners.launch --standalone --nproc-per-node 4 -m emo_megatron select ...
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_megatron.files import message_of
from emo_megatron.processes import run
from emo_megatron.variables import IN_RANKS, PARENT

USER_ERROR = 2
"""Exit status after an error that the user can mend, told in one line."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's variable: a rank leaves in this file what it failed of."""


def is_rank() -> bool:
    """Whether this process does the work of a command that runs elsewhere."""
    return IN_RANKS in os.environ


def again(name: str, options: Any, *, processes: int, log: Path) -> None:
    """Run a command with the same options in other processes, to their end.

    A command that has said what the user can mend did nothing: an earlier log stays, and no new folder does.

    Args:
        name, options: of the command.
        processes: how many; one is another process, too.
        log: file for what they print, which is Megatron's.
    """
    made = [folder for folder in log.absolute().parents if not folder.exists()]
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = log.with_name(f"{log.name}.unfinished")
    command = python("-m", "emo_megatron", name, *arguments_of(options), processes=processes)
    code: int | None = None
    try:
        with unfinished.open("wb") as megatron_says:
            code = run(command, stdout=megatron_says, environment={IN_RANKS: "1"})
    finally:
        if code == USER_ERROR:
            unfinished.unlink(missing_ok=True)
            _remove_empty(made)
        elif unfinished.exists():
            # an interrupted command's, too: it may tell what the user did not wait for
            unfinished.replace(log)
    if code == USER_ERROR:
        sys.exit(code)
    if code != 0:
        raise RuntimeError(f"{name} stopped with exit code {code}; Megatron's own output is in {log}")


def python(*arguments: object, processes: int = 1) -> list[str]:
    """A command of this interpreter; for several processes under our torchrun, whose ranks meet at this host."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "emo_megatron.runners.launch", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(processes)]
    return [*command, *(str(argument) for argument in arguments)]


def arguments_of(options: Any) -> list[str]:
    """The arguments that tyro reads as these options; those that are as by default are left out."""
    found: list[str] = []
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default or value is False:
            continue
        # paths whole: the command may run elsewhere
        values = [
            str(item.absolute() if isinstance(item, Path) else item)
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        if value is True:
            found.append(flag)
        elif isinstance(value, tuple):
            found += [flag, *values]
        else:
            # one argument: a value may look like a flag
            found.append(f"{flag}={values[0]}")
    return found


def say_error(message: str) -> None:
    """Tell the user, in one line; a rank of torchrun tells torchrun, which tells it once for all ranks."""
    if is_rank() and (file := os.environ.get(ERROR_FILE)):
        described = {"message": message, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(described), encoding="utf-8")
    else:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first that something was written to."""
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def main() -> int:
    """Run torchrun with this process's arguments and return the exit status of the command.

    The ranks end with this process, which torchrun alone leaves to chance when it is killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_ranks

    # of ranks that failed and were stopped, which is told below
    logging.disable(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())
    args = parse_args(sys.argv[1:])
    # nohup's are not
    heard = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    is_ignored = {name: signal.getsignal(getattr(signal, name)) == signal.SIG_IGN for name in heard}
    args.signals_to_handle = ",".join(name for name in heard if not is_ignored[name])
    try:
        run_ranks(args)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        for failure in error.failures.values():
            if failure.exitcode == USER_ERROR:
                print(f"error: {failure.message}", file=sys.stderr, flush=True)
                return USER_ERROR
        print(message_of(error), file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
