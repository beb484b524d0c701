"""The command line: parse, call one function, print where its result lies."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tyro

from emo_megatron.environment import collect_environment, format_json, format_text

USAGE_ERROR = 2
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Print versions, op backends, GPUs and what is supported: paste it into a bug report."""

    json: bool = False
    """Print JSON instead of text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        0, or 2 after a user error or a missing optional package, told in one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "emo_megatron":
            raise
        return _fail(
            f"{arguments[0]} needs {error.name}, which is not installed: "
            "pip install 'emo_megatron[demo]'"
        )
    except (FileNotFoundError, ImportError, RuntimeError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(arguments: list[str]) -> None:
    options = tyro.extras.subcommand_cli_from_dict(
        {"env": EnvOptions, "demo": _demo_options(arguments)},
        prog="emo_megatron",
        description="Pretrain EMO through Megatron and take modules out of it.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(options, EnvOptions):
        report = collect_environment()
        print(format_json(report) if options.json else format_text(report))
        return
    from emo_megatron.demo.run import run_demo

    print(f"results: {run_demo(options)}")


def _demo_options(arguments: list[str]) -> Callable[..., object]:
    """Give the demo's options, imported only where they are parsed: they bring torch along."""
    if arguments[:1] == ["demo"]:
        from emo_megatron.demo.run import DemoConfig

        return DemoConfig

    def demo() -> None:
        """Pretrain EMO and the matched standard MoE on real text, cut modules out, compare."""

    return demo


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE_ERROR
