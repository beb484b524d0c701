"""torchrun for this package's steps: what a step tells the user stays one line, and its exit status stays its own.

torchrun itself ends with 1 whatever its ranks ended with, after a page of report.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from emo_megatron.files import message_of
from emo_megatron.variables import PARENT

USER_ERROR = 2
"""Exit status of a step after it has said what the user can mend."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""torchrun's variable: a rank leaves in this file what it failed of."""


def say_error(error: Exception) -> None:
    """Tell the user, in one line; a rank of torchrun tells torchrun, which tells it once for all ranks."""
    if file := os.environ.get(ERROR_FILE):
        described = {"message": message_of(error), "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(described), encoding="utf-8")
    elif os.environ.get("RANK", "0") == "0":
        print(f"error: {message_of(error)}", file=sys.stderr, flush=True)


def main() -> int:
    """Run torchrun with this process's arguments and return the exit status of the step.

    The ranks end with this process, which torchrun alone leaves to chance when it is killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # of ranks that failed and were stopped, which is told below
    logging.disable(logging.CRITICAL)
    os.environ[PARENT] = str(os.getpid())
    args = parse_args(sys.argv[1:])
    # nohup's are not
    heard = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    is_ignored = {name: signal.getsignal(getattr(signal, name)) == signal.SIG_IGN for name in heard}
    args.signals_to_handle = ",".join(name for name in heard if not is_ignored[name])
    try:
        run(args)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        for failure in error.failures.values():
            if failure.exitcode == USER_ERROR:
                print(f"error: {failure.message}", file=sys.stderr, flush=True)
                return USER_ERROR
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
