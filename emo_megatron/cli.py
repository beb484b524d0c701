"""The command line: parse, call one function, print where its result lies."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from emo_megatron.environment import BRIDGE_INSTALL, collect_environment, format_json, format_text
from emo_megatron.files import message_of, to_output, write_any_name
from emo_megatron.processes import stops_on_signals
from emo_megatron.variables import as_no_other_job, stay_offline

USAGE_ERROR = 2
INTERRUPTED = 130


DEMO_INSTALL = "pip install 'emo_megatron[demo]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A subcommand whose code is imported only where it runs: it brings torch or Megatron along."""

    summary: str
    """What --help lists it with; its own --help shows the options' docstrings."""
    module: str
    options: str
    """Name of a dataclass in the module."""
    function: str
    """Name of a function of it there, which returns where the result lies, and may say more of it in further lines;
    None where there is nothing to say."""
    install: str = DEMO_INSTALL
    """What brings the packages it needs."""
    is_in_a_job: bool = False
    """A rank of the training job around it, which has its own way with signals and may fetch what it needs."""


COMMANDS = {
    "bridge": Command(
        summary="Train a Megatron-Bridge (NeMo) recipe with document pools.",
        module="emo_megatron.cli",
        options="BridgeOptions",
        function="run_bridge",
        install=BRIDGE_INSTALL,
        is_in_a_job=True,
    ),
    "demo": Command(
        summary="Pretrain EMO and the matched standard MoE on real text, cut modules out, compare.",
        module="emo_megatron.demo.run",
        options="DemoConfig",
        function="run_demo",
    ),
    "stats": Command(
        summary="Measure what the experts of a model do on calibration documents.",
        module="emo_megatron.mcore.launch",
        options="StatsOptions",
        function="run_stats",
    ),
    "merge-stats": Command(
        summary="Merge statistics of different documents into one file.",
        module="emo_megatron.modules.choosing",
        options="MergeStatsOptions",
        function="merge_files",
    ),
    "select": Command(
        summary="Choose the experts a task needs.",
        module="emo_megatron.mcore.launch",
        options="SelectOptions",
        function="run_select",
    ),
    "retention": Command(
        summary="Measure what a model loses with fewer experts, and find the cliff.",
        module="emo_megatron.retention",
        options="RetentionOptions",
        function="run_retention",
    ),
    "extract": Command(
        summary="Cut a module out of a Megatron checkpoint.",
        module="emo_megatron.mcore.extract",
        options="ExtractOptions",
        function="extract",
    ),
    "compose": Command(
        summary="Put modules of one parent together: their Selections, or their checkpoints.",
        module="emo_megatron.mcore.merge",
        options="ComposeOptions",
        function="compose",
    ),
    "merge": Command(
        summary="Put a module's trained experts back into its parent.",
        module="emo_megatron.mcore.merge",
        options="MergeOptions",
        function="merge",
    ),
    "place": Command(
        summary="Place experts that are used together on one expert-parallel rank.",
        module="emo_megatron.modules.placing",
        options="PlaceOptions",
        function="place_files",
    ),
    "relabel": Command(
        summary="Put a checkpoint's experts in the order of a placement.",
        module="emo_megatron.mcore.relabel",
        options="RelabelOptions",
        function="relabel",
    ),
    "export": Command(
        summary="Export a checkpoint or a module to Hugging Face.",
        module="emo_megatron.mcore.hf_export",
        options="ExportOptions",
        function="export",
    ),
    "import": Command(
        summary="Import a Hugging Face checkpoint for Megatron.",
        module="emo_megatron.mcore.hf_import",
        options="ImportOptions",
        function="import_folder",
    ),
    "eval-task": Command(
        summary="Make a task of lm-eval of held-out documents.",
        module="emo_megatron.modules.hf.evaluation_task",
        options="EvaluationTaskOptions",
        function="write_evaluation_task",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EnvOptions:
    """Print versions, op backends, GPUs and what is supported: paste it into a bug report."""

    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True, kw_only=True)
class BridgeOptions:
    """Train a Megatron-Bridge (NeMo) recipe with document pools, as it is or under torchrun.

    torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe olmoe_7b_pretrain_config model.pool_min=8

    torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe qwen3_30b_a3b_pretrain_config model.pool_min=8
    model.pool_unrestricted=0.05 train.train_iters=100 checkpoint.save=runs/qwen3

    Options of the recipe that pools forbid are changed, and each change is printed. docs/bridge.md tells which.
    """

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """Fields of the recipe and their values, as Megatron-Bridge takes them. model.pool_min must be among them."""
    recipe: str = ""
    """A function of megatron.bridge.recipes or perf_recipes, by its name; or module:function for one of your own."""
    strict: bool = False
    """Refuse a recipe of which an option must change, instead of changing it."""
    list: bool = False
    """Print the MoE pretraining recipes and train nothing."""


def run_bridge(options: BridgeOptions) -> str | None:
    """Train, or list the recipes.

    Returns:
        Where the checkpoints lie, if there are any.

    Raises:
        ImportError: Megatron-Bridge is missing or of another version.
        ValueError: the recipe cannot be trained like this; says what to write instead.
    """
    from emo_megatron.mcore import cpu
    from emo_megatron.mcore.compat import require_bridge

    if not (options.list or options.recipe):
        raise ValueError("--recipe must be given; --list prints the recipes")
    require_bridge()
    # before Bridge is imported, which asks for GPUs
    cpu.activate()
    from emo_megatron.bridge import command

    if options.list:
        _say("\n".join(command.moe_recipes()))
        return None
    return command.run(options.recipe, options.overrides, strict=options.strict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; the Hugging Face libraries of this process stay offline afterwards,
    unless it trains in a job.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        0, or 2 after a user error or a missing optional package, told in one line on stderr, or 130 after Ctrl-C.

    Raises:
        SystemExit: it was ended by another signal, or the arguments say so.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    write_any_name()
    try:
        with contextlib.nullcontext() if command and command.is_in_a_job else _alone():
            _run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "emo_megatron":
            raise
        return _fail(
            f"{arguments[0]} needs {error.name}, which is not installed: {command.install if command else DEMO_INSTALL}"
        )
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        return _fail(message_of(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A process of this package alone, whatever is around it."""
    stay_offline()
    with as_no_other_job(), stops_on_signals():
        yield


def _run(arguments: list[str]) -> None:
    chosen = arguments[0] if arguments else ""
    options = tyro.extras.subcommand_cli_from_dict(
        {"env": EnvOptions} | {name: _options(command, is_chosen=name == chosen) for name, command in COMMANDS.items()},
        prog="emo_megatron",
        description="Pretrain EMO through Megatron and take modules out of it.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if isinstance(options, EnvOptions):
        report = collect_environment()
        _say(format_json(report) if options.json else format_text(report))
        return
    command = COMMANDS[chosen]
    function = getattr(importlib.import_module(command.module), command.function)
    if (result := function(options)) is not None:
        _say(f"results: {result}")


def _say(text: str) -> None:
    with to_output():
        print(text)


def _options(command: Command, *, is_chosen: bool) -> Callable[..., object]:
    """What tyro parses; of the others it needs the summary only."""
    if is_chosen:
        options: Callable[..., object] = getattr(importlib.import_module(command.module), command.options)
        return options

    def other() -> None:
        pass

    other.__doc__ = command.summary
    return other


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USAGE_ERROR
