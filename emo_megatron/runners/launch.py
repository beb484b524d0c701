"""Run a step of this package in processes of its own: one command for the user, one process for every GPU."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from emo_megatron.commands.options import ModelOptions, SelectOptions, StatsOptions
from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.files import must_not_exist
from emo_megatron.mcore.flags import flags_of, prefixed
from emo_megatron.processes import run
from emo_megatron.runners.base import stats_in
from emo_megatron.runners.ranks import USER_ERROR
from emo_megatron.runners.retention import check_output


def python(*arguments: object, processes: int = 1) -> list[str]:
    """A command of this interpreter; for several processes our torchrun's, whose ranks meet at this host."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "emo_megatron.runners.ranks", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(processes)]
    return [*command, *(str(argument) for argument in arguments)]


def run_stats(options: StatsOptions) -> Path:
    """Measure a checkpoint's experts; returns the statistics file.

    Raises:
        ValueError, SystemExit: what was asked for cannot be; where the model runs, its processes said why.
        RuntimeError: they failed.
    """
    stats_in(options.output)
    if _is_hugging_face(options.checkpoint):
        from emo_megatron.runners import hf_commands

        hf_commands.run_stats(options)
    else:
        _run("stats", options, checkpoint=options.checkpoint, log=_log_beside(options.output))
    return options.output


def run_select(options: SelectOptions) -> Path:
    """Choose experts; returns the Selection file.

    Raises:
        ValueError, SystemExit: what was asked for cannot be; where the model runs, its processes said why.
        RuntimeError: they failed.
    """
    from emo_megatron.commands.select import select

    must_not_exist(options.output)
    if not options.needs_model and options.stats:
        select(options)
        return options.output
    assert options.checkpoint is not None, "checked with the options"
    if _is_hugging_face(options.checkpoint):
        from emo_megatron.runners import hf_commands

        hf_commands.run_select(options)
    else:
        _run("select", options, checkpoint=options.checkpoint, log=_log_beside(options.output))
    return options.output


def run_retention(options: RetentionOptions) -> Path:
    """Measure a checkpoint with fewer experts; returns the file of rows.

    Raises:
        ValueError, SystemExit: what was asked for cannot be; where the model runs, its processes said why.
        RuntimeError: they failed.
    """
    check_output(options)
    if _is_hugging_face(options.checkpoint):
        from emo_megatron.runners import hf_commands

        hf_commands.run_retention(options)
    else:
        _run("retention", options, checkpoint=options.checkpoint, log=options.output / "retention.log")
    return options.rows_file


def _is_hugging_face(checkpoint: Path) -> bool:
    return (checkpoint / "config.json").is_file()


def _log_beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.log")


def step_arguments(step: str, options: ModelOptions, *, checkpoint: Path) -> tuple[str, ...]:
    """What `python` runs a step with."""
    return (
        *("-m", f"emo_megatron.runners.rank_{step}", "--load", str(checkpoint.absolute())),
        *flags_of(options, flag=prefixed(step)),
        *_layout(options),
        *shlex.split(options.megatron),
    )


def _run(step: str, options: ModelOptions, *, checkpoint: Path, log: Path) -> None:
    """Run a step's command; Megatron's own output goes to the log file.

    A step that has said what the user can mend did nothing: an earlier log stays, and no new folder does.
    """
    arguments = step_arguments(step, options, checkpoint=checkpoint)
    made = [folder for folder in log.absolute().parents if not folder.exists()]
    log.parent.mkdir(parents=True, exist_ok=True)
    unfinished = log.with_name(f"{log.name}.unfinished")
    code: int | None = None
    try:
        with unfinished.open("wb") as megatron_says:
            code = run(python(*arguments, processes=options.processes), stdout=megatron_says)
    finally:
        if code == USER_ERROR:
            unfinished.unlink()
            _remove_empty(made)
        elif unfinished.exists():
            # an interrupted step's, too: it may tell what the user did not wait for
            unfinished.replace(log)
    if code == USER_ERROR:
        sys.exit(code)
    if code != 0:
        raise RuntimeError(f"{step} stopped with exit code {code}; Megatron's own output is in {log}")


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, innermost first, up to the first that something was written to."""
    for folder in folders:
        if any(folder.iterdir()):
            return
        folder.rmdir()


def _layout(options: ModelOptions) -> tuple[str, ...]:
    """Megatron's flags for the layout."""
    sizes = {
        "--tensor-model-parallel-size": options.tensor_parallel,
        "--pipeline-model-parallel-size": options.pipeline_parallel,
        "--expert-model-parallel-size": options.expert_parallel,
        # a rank has whole experts, whose outputs can be measured
        "--expert-tensor-parallel-size": 1,
    }
    flags = [part for name, size in sizes.items() for part in (name, str(size))]
    return (*flags, *(("--sequence-parallel",) if options.tensor_parallel > 1 else ()))
