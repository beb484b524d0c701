"""The command line: parse, call one function, print where its result lies."""

import contextlib
import importlib
import keyword
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import tyro

from emo_megatron.files import message_of, say, to_output, write_any_name
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners import launch
from emo_megatron.variables import as_no_other_job, stay_offline

INTERRUPTED = 130
DEMO_INSTALL = "pip install 'emo_megatron[demo]'"

COMMANDS = {
    "bridge": "Train a Megatron-Bridge (NeMo) recipe with document pools.",
    "stats": "Measure what the experts of a model do on calibration documents.",
    "merge-stats": "Merge statistics of different documents into one file.",
    "select": "Choose the experts a task needs.",
    "retention": "Measure what a model loses with fewer experts, and find the cliff.",
    "extract": "Cut a module out of a Megatron checkpoint.",
    "compose": "Put modules of one parent together: their Selections, or their checkpoints.",
    "merge": "Put a module's trained experts back into its parent.",
    "place": "Place experts that are used together on one expert-parallel rank.",
    "relabel": "Put a checkpoint's experts in the order of a placement.",
    "export": "Export a checkpoint or a module to Hugging Face.",
    "import": "Import a Hugging Face checkpoint for Megatron.",
    "eval-task": "Make a task of lm-eval of held-out documents.",
    "env": "Print versions, op backends, GPUs and what is supported: paste it into a bug report.",
}
"""Subcommand -> its line in --help. Its code is `emo_megatron.commands.NAME`, which is imported only where it runs,
because it loads torch or Megatron. That module holds

    Options          a dataclass; its docstrings are the command's --help
    run(options)     does it; returns where the result lies, or None
    INSTALL          optional: what installs the packages that the command needs
    IS_IN_A_JOB      optional: True for a rank of the training job around it, which handles signals itself and may fetch
                     what it needs
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; the Hugging Face libraries of this process stay offline afterwards,
    unless it trains in a job.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        0, or 2 after a user error or a missing optional package, told in one line on stderr, or 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: ModuleType | None = None
    write_any_name()
    try:
        command = _module(arguments)
        with _surroundings(command):
            _run(arguments, command)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "emo_megatron":
            raise
        install = getattr(command, "INSTALL", DEMO_INSTALL)
        return _fail(f"{arguments[0]} needs {error.name}, which is not installed: {install}")
    except (ImportError, MemoryError, NotImplementedError, OSError, ValueError) as error:
        return _fail(message_of(error))
    except RuntimeError as error:
        # what a rank fails of, its user cannot mend: the traceback goes with it
        if launch.is_rank():
            raise
        return _fail(message_of(error))
    except KeyboardInterrupt:
        # the command that started a rank says so
        if not launch.is_rank():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _surroundings(command: ModuleType | None) -> Iterator[None]:
    """How a command lives with what is around it: in a job, in the ranks of a command, or alone."""
    if getattr(command, "IS_IN_A_JOB", False):
        yield
        return
    stay_offline()
    around = contextlib.nullcontext() if launch.is_rank() else as_no_other_job()
    with around, stops_on_signals():
        yield


def _module(arguments: Sequence[str]) -> ModuleType | None:
    """The code of the command that is called; None where none is."""
    if arguments[:1] == ["demo"]:
        raise ValueError("the demo is a script of the repository: run make demo, or demo/demo.sh, in a checkout")
    if not arguments or arguments[0] not in COMMANDS:
        return None
    name = arguments[0].replace("-", "_")
    # import is a word of Python
    return importlib.import_module(f"emo_megatron.commands.{name}{'_' if keyword.iskeyword(name) else ''}")


def _run(arguments: list[str], command: ModuleType | None) -> None:
    chosen = arguments[0] if arguments else ""
    options = tyro.extras.subcommand_cli_from_dict(
        {
            name: _summary(summary) if command is None or name != chosen else command.Options
            for name, summary in COMMANDS.items()
        },
        prog="emo_megatron",
        description="Pretrain EMO through Megatron and take modules out of it.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert command is not None
    if launch.is_rank():
        with to_output():
            command.run(options)
    elif (result := command.run(options)) is not None:
        say(f"results: {result}")


def _summary(text: str) -> Callable[[], None]:
    """What tyro lists a command with that is not called."""

    def other() -> None:
        pass

    other.__doc__ = text
    return other


def _fail(message: str) -> int:
    launch.say_error(message)
    return launch.USER_ERROR
