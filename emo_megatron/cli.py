"""The command line: parse the arguments, call one function, print the path of the result."""

import contextlib
import dataclasses
import importlib
import keyword
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import tyro

from emo_megatron.arguments import current_arguments, new_command
from emo_megatron.files import message_of, say, to_output, write_any_name
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners import launch
from emo_megatron.variables import as_no_other_job, stay_offline

INTERRUPTED = 130
DEMO_INSTALL = "pip install 'emo_megatron[demo]'"

COMMANDS = {
    "bridge": "Train a Megatron-Bridge (NeMo) recipe with document pools.",
    "stats": "Measure how the experts of a model are used on calibration documents.",
    "merge-stats": "Merge statistics of different documents into one file.",
    "select": "Choose the experts that a task needs.",
    "retention": "Measure the loss increase of a model that keeps fewer experts.",
    "extract": "Extract a module, a model with fewer experts, from a Megatron checkpoint.",
    "compose": "Combine modules of one parent: their Selections, or their checkpoints.",
    "merge": "Put the trained experts of modules back into the parent checkpoint.",
    "place": "Choose which experts share an expert-parallel rank.",
    "reorder": "Put the experts of a checkpoint in the order of a placement.",
    "export": "Convert a Megatron checkpoint or a module for Hugging Face, servers and llama.cpp.",
    "import": "Convert a Hugging Face checkpoint to a Megatron checkpoint.",
    "eval-task": "Write validation documents as a task of lm-eval.",
    "env": "Print versions, GPUs and what is supported, for a bug report.",
}
"""Command -> its line in --help. The code of a command is `emo_megatron.commands.NAME`, which is imported only when the
command runs, because the module loads torch or Megatron. The module has

    Options          a dataclass; its docstrings are the --help of the command
    run(options)     runs the command; returns the path of the result, or None
    INSTALL          optional: how to install the packages that the command needs
    IS_IN_A_JOB      optional: True if the command is a rank of a training job around it; such a job handles signals
                     itself and may download files
"""
DESCRIPTION = """Pretrain EMO models with Megatron, and extract, combine, export and measure modules.

In the usual order: stats, select, retention, extract, export. Every command explains itself:

    emo_megatron select --help

Completion of commands and flags in bash, for example; zsh and tcsh work in the same way:

    mkdir -p ~/.local/share/bash-completion/completions
    emo_megatron --tyro-write-completion bash ~/.local/share/bash-completion/completions/emo_megatron
"""
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
"""tyro's flags that write the completion of a shell, which needs the flags of all commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Afterwards the Hugging Face libraries of this process stay offline,
    except for a command that trains in a job.

    Args:
        argv: the arguments after the name of the program; None takes the arguments of the process.

    Returns:
        0 on success; 2 after a user error or a missing optional package, which one line on stderr reports; 130 after
        Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command: ModuleType | None = None
    write_any_name()
    try:
        arguments = _command_first(arguments)
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
        # the user cannot fix an error inside a rank: keep the traceback
        if launch.is_rank():
            raise
        return _fail(message_of(error))
    except KeyboardInterrupt:
        # the command that started the ranks prints the message
        if not launch.is_rank():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _surroundings(command: ModuleType | None) -> Iterator[None]:
    """Set up signals and environment variables: for a command in a job, in the ranks of a command, or on its own."""
    if getattr(command, "IS_IN_A_JOB", False):
        yield
        return
    stay_offline()
    around = contextlib.nullcontext() if launch.is_rank() else as_no_other_job()
    with around, stops_on_signals():
        yield


def _command_first(arguments: list[str]) -> list[str]:
    """The arguments, beginning with the present name of a command."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    if arguments[0] == "demo":
        raise ValueError("the demo is a script of the repository: run make demo, or demo/demo.sh, in a clone")
    return [new_command(arguments[0], COMMANDS), *arguments[1:]]


def _module(arguments: Sequence[str]) -> ModuleType | None:
    """The module of the command; None without a command."""
    return _import(arguments[0]) if arguments and arguments[0] in COMMANDS else None


def _import(name: str) -> ModuleType:
    name = name.replace("-", "_")
    # import is a keyword of Python
    return importlib.import_module(f"emo_megatron.commands.{name}{'_' if keyword.iskeyword(name) else ''}")


def _run(arguments: list[str], command: ModuleType | None) -> None:
    chosen = arguments[0] if arguments else ""
    if command is not None:
        arguments = [chosen, *current_arguments(chosen, arguments[1:], command.Options)]
    loads_all = any(argument.partition("=")[0] in COMPLETION for argument in arguments)
    options = tyro.extras.subcommand_cli_from_dict(
        {
            name: _unchecked(_import(name).Options) if loads_all or name == chosen else _summary(summary)
            for name, summary in COMMANDS.items()
        },
        prog="emo_megatron",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert command is not None
    options = command.Options(**{f.name: getattr(options, f.name) for f in dataclasses.fields(command.Options)})
    if launch.is_rank():
        with to_output():
            command.run(options)
    elif (result := command.run(options)) is not None:
        say(f"results: {result}")


def _unchecked(options: Any) -> Any:
    """A dataclass of options without its own checks, whose errors tyro would print as a box of several lines."""
    return type("Options", (options,), {"__post_init__": lambda _: None, "__doc__": options.__doc__})


def _summary(text: str) -> Callable[[], None]:
    """An entry of the list of commands, for a command that does not run."""

    def other() -> None:
        pass

    other.__doc__ = text
    return other


def _fail(message: str) -> int:
    launch.say_error(message)
    return launch.USER_ERROR
