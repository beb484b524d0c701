"""Run a command again in new processes: Megatron can start only once per process, and needs one process per GPU.

The user runs one command. The command runs itself again with the same options, in one process or under torchrun.
`is_rank` is true in these new processes, which do the work. They do not inherit variables of a surrounding job.
This module also replaces torchrun's own command, which always exits with 1 after a long report, whatever the exit
status of the ranks:

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
"""Exit status after an error that the user can fix; the error is reported in one line."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's variable with the file to which a rank writes its error."""


def is_rank() -> bool:
    """Whether this process was started by a command to do its work."""
    return IN_RANKS in os.environ


def again(name: str, options: Any, *, processes: int, log: Path) -> None:
    """Run a command with the same options in new processes, and wait until they end.

    After an error that the user can fix, an earlier log is kept and new folders are removed.

    Args:
        name, options: name and options of the command.
        processes: number of processes; 1 also starts a new process.
        log: file for the output of the processes, which is Megatron's output.
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
            # keep the log of an interrupted command too: it may show why the command was slow
            unfinished.replace(log)
    if code == USER_ERROR:
        sys.exit(code)
    if code != 0:
        raise RuntimeError(f"{name} stopped with exit code {code}; Megatron's own output is in {log}")


def python(*arguments: object, processes: int = 1) -> list[str]:
    """Command line of this Python; several processes run under this module's torchrun, with rendezvous on this host."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "emo_megatron.runners.launch", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(processes)]
    return [*command, *(str(argument) for argument in arguments)]


def arguments_of(options: Any) -> list[str]:
    """The arguments from which tyro makes these options; options with their default value are left out."""
    found: list[str] = []
    for field in dataclasses.fields(options):
        value, flag = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if value == field.default or value is False:
            continue
        # absolute paths, because the new process may run in another folder
        values = [
            str(item.absolute() if isinstance(item, Path) else item)
            for item in (value if isinstance(value, tuple) else (value,))
        ]
        if value is True:
            found.append(flag)
        elif isinstance(value, tuple):
            found += [flag, *values]
        else:
            # flag and value in one argument, because a value may look like a flag
            found.append(f"{flag}={values[0]}")
    return found


def say_error(message: str) -> None:
    """Print an error in one line; a rank writes the error to torchrun's file instead, and `main` prints one for all."""
    if is_rank() and (file := os.environ.get(ERROR_FILE)):
        described = {"message": message, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(described), encoding="utf-8")
    else:
        print(f"error: {message}", file=sys.stderr, flush=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove empty folders, innermost first, and stop at the first folder that is not empty."""
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def main() -> int:
    """Run torchrun with this process's arguments and return the exit status of the command.

    The ranks end with this process. torchrun alone does not guarantee this when torchrun is killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as run_ranks

    # torchrun logs failed and stopped ranks; the error is printed below
    logging.disable(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())
    args = parse_args(sys.argv[1:])
    # signals ignored under nohup stay ignored
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
