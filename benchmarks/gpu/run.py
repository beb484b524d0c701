"""Run the steps of one stage within a time budget, and keep a bundle of results that is complete after every step.

A step that fails or takes too long is reported in the summary, and the run continues. Exit status: 0 if no step failed;
1 if a step failed; 2 for wrong arguments or an unsuitable machine, in which case nothing is written. Needs only the
standard library.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import machine
import steps as table
from bundle import SUMMARY
from machine import ROOT
from stage import Stage, Stopped

XZ = b"\xfd7zXZ\0"
"""First bytes of a packed corpus."""
FEWEST_MIB = 0.1
"""The summary's rows alone take some of that."""


def main() -> int:
    """Check, run, and return the exit status."""
    options = read_arguments()
    gpu = check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="emo-gpu-", ignore_cleanup_errors=True) as scratch:
        try:
            is_fine = Stage(options, gpu=gpu, scratch=Path(scratch)).run()
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 128 + stopped.number
    print(options.output / SUMMARY)
    return 0 if is_fine else 1


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(message)


def refuse(message: str) -> NoReturn:
    """Print an error and exit with 2, before the run starts."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="benchmarks/gpu.sh", description=__doc__)
    add = parser.add_argument
    about = "A: correctness and kernels, B: layer and model, C: one model's fidelity"
    add("stage", type=str.upper, choices=list(table.STAGES), help=about)
    add("model", nargs="?", choices=table.MODELS, help="with stage C, the model to train")
    about = "seconds for the whole run, default %(default)s; steps that do not fit are not run"
    add("--budget", type=float, default=table.MOST_SECONDS, metavar="SECONDS", help=about)
    about = "folder for the two output files, new or empty; default runs/gpu-STAGE-DATE"
    add("--output", type=Path, metavar="FOLDER", help=about)
    about = f"folder with wheels that this Python lacks, among {', '.join(machine.WHEELS)}"
    add("--wheels", type=Path, metavar="FOLDER", help=about)
    about = "with stage C, folder of earlier bundles to compare with"
    add("--partners", type=Path, metavar="FOLDER", help=about)
    about = "with stage C, the text: a file packed by python -m demo.packages, or a folder; default this machine's text"
    add("--corpus", type=Path, metavar="FILE", help=about)
    about = "commit of this tree; default EMO_COMMIT, otherwise the commit that git reports"
    add("--commit", default=os.environ.get("EMO_COMMIT"), metavar="SHA", help=about)
    about = "largest number of output files, default 2; with 1, no archive is written"
    add("--max-files", type=int, default=2, metavar="N", help=about)
    about = "largest size of the output in MiB, default %(default)s; the largest logs are left out first"
    add("--max-mib", type=float, default=15.0, metavar="M", help=about)
    about = "run every step on the CPU at a small size; needs no GPU"
    add("--rehearse", action="store_true", help=about)
    options = parser.parse_args()
    if options.output is None:
        name = f"gpu-{options.stage.lower()}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        options.output = ROOT / "runs" / name
    for name in ("output", "wheels", "partners", "corpus"):
        if path := getattr(options, name):
            # steps have a current folder of their own
            setattr(options, name, path.absolute())
    return options


def check(options: argparse.Namespace) -> machine.Gpu | None:
    """Refuse what cannot work, before anything is written; returns the GPU."""
    if wrong := table.over_budget():
        refuse(f"the steps of stage {', '.join(wrong)} sum to more than {table.MOST_SECONDS} s")
    if (options.stage == "C") != (options.model is not None):
        refuse(f"stage C, and no other, takes a model: {', '.join(table.MODELS)}")
    if options.max_files < 1 or options.max_mib < FEWEST_MIB:
        refuse(f"--max-files must be at least 1 and --max-mib at least {FEWEST_MIB}")
    smallest = min(step.seconds for step in table.STAGES[options.stage]) + table.BUNDLE_SECONDS
    if not options.budget >= smallest:  # NaN is not either
        given = f"--budget {options.budget:g} is too small for any step of stage {options.stage}"
        refuse(f"{given}: the smallest needs {smallest} s with the bundle")
    if options.partners and not options.partners.is_dir():
        refuse(f"--partners {options.partners} is no folder")
    if options.corpus:
        _check_corpus(options)
    gpu = machine.find_gpu()
    if gpu is None and not options.rehearse:
        refuse("no GPU: nvidia-smi is missing, fails or lists none; --rehearse runs without")
    if not machine.LIBRARY.exists() and machine.why_lacking("nvcc"):
        library = machine.LIBRARY.relative_to(ROOT)
        refuse(f"there is no {library} and no nvcc to build it: bring the file, or set CUDA_HOME")
    if options.wheels:
        _check_wheels(options.wheels)
    _check_output(options.output)
    return gpu


def _check_corpus(options: argparse.Namespace) -> None:
    if options.stage != "C":
        refuse(f"--corpus is for stage C; stage {options.stage} reads no text")
    if not options.corpus.exists():
        refuse(f"--corpus {options.corpus} does not exist")
    if options.corpus.is_file():
        with options.corpus.open("rb") as file:
            if file.read(len(XZ)) != XZ:
                refuse(f"--corpus {options.corpus} is not a corpus packed by python -m demo.packages")


def _check_wheels(folder: Path) -> None:
    if not folder.is_dir():
        refuse(f"--wheels {folder} is no folder")
    wheels = machine.wheels_in(folder)
    if broken := [path.name for path in wheels.values() if not zipfile.is_zipfile(path)]:
        refuse(f"--wheels {folder} holds broken files: {', '.join(broken)}")
    missing = [name for name in machine.lacking_wheels() if name not in wheels]
    if missing:
        refuse(f"--wheels {folder} lacks {', '.join(missing)}, and so does this Python")


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        refuse(f"--output {output} exists and is not an empty folder: name a new one")
    above = next(path for path in (output, *output.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        refuse(f"--output {output} cannot be written: {above} is no folder, or closed to writing")


if __name__ == "__main__":
    sys.exit(main())
