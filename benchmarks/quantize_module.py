"""How much does quantisation by NVIDIA ModelOpt raise the loss of a module? A quarter of the experts, two domains.

    make demo && make modelopt && .venv/bin/python benchmarks/quantize_module.py

Takes the demo's EMO, cuts the module of each domain out, exports the module, and measures the loss of the checkpoint
and of the Hugging Face folder in every format of quantized_loss.py. Writes quantize.json and quantize.md into
benchmarks/results. An interrupted run resumes; a run with other settings or versions is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro
from claims import claim_results
from quantized_loss import FORMATS, UNQUANTIZED, find_modelopt
from timing import describe_machine

from demo.jobs import Job, run_jobs
from demo.recipe import run_step
from emo_megatron.environment import collect_environment
from emo_megatron.json_files import read_object, to_json

STORED, _ = UNQUANTIZED
HERE = Path(__file__).resolve().parent
SIDES = {"Megatron": "module", "Hugging Face": "hf"}
"""Where a module runs -> its folder."""
VERSIONS = ("torch", "megatron-core", "transformers", "nvidia-modelopt")
"""Packages whose version changes a loss."""
HEADINGS = ("domain", "model", "format", "loss", "loss increase", "quantisers", "of experts")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure quantised modules of the demo's EMO."""

    run: Path = Path("runs/demo")
    """Folder of a finished demo."""
    output: Path = Path("runs/quantize")
    """Folder for the modules and losses."""
    results: Path = HERE / "results"
    """Folder for quantize.json and quantize.md."""
    domains: tuple[str, ...] = ("python", "fr")
    keep: str = "25%"
    seq_length: int = 256
    tokens: int = 8192
    """Calibration tokens, for the choice of experts and for the ranges of quantised inputs."""
    validation_tokens: int = 16384


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One loss: of a model on a domain, in a format."""

    domain: str
    model: str
    """parent, or where the module runs."""
    format: str
    checkpoint: Path
    file: Path


def measurements(options: Options) -> Iterator[Measurement]:
    """Everything that is measured, in the order of the table."""
    parent = options.run / "emo" / "checkpoint"
    for domain in options.domains:
        folder = options.output / domain
        yield Measurement(domain=domain, model="parent", format=STORED, checkpoint=parent, file=folder / "parent.json")
        for side, name in SIDES.items():
            for format in (*UNQUANTIZED, *FORMATS):
                file = folder / f"{name}-{format}.json"
                yield Measurement(domain=domain, model=side, format=format, checkpoint=folder / name, file=file)


def jobs(options: Options) -> Iterator[Job]:
    """Cut the modules out, export and measure them."""
    corpus, parent = options.run / "corpus", options.run / "emo" / "checkpoint"
    for domain in options.domains:
        folder = options.output / domain
        stats, selection, module = folder / "stats.safetensors", folder / "selection.json", folder / "module"
        data = corpus / "calibration" / f"{domain}.safetensors"
        size = ("--tokens", options.tokens, "--seq-length", options.seq_length)
        yield _command(stats, *("stats", "--checkpoint", parent, "--data", data), *size)
        yield _command(selection, *("select", "--stats", stats, "--keep", options.keep))
        yield _command(module, *("extract", "--checkpoint", parent, "--selection", selection))
        yield _command(folder / "hf", *("export", "--checkpoint", module, "--tokenizer", corpus / "tokenizer"))
    for one in measurements(options):
        data, validation = (corpus / part / f"{one.domain}.safetensors" for part in ("calibration", "validation"))
        yield _job(
            one.file,
            *(HERE / "quantized_loss.py", "--checkpoint", one.checkpoint, "--format", one.format, "--data", data),
            *("--validation-data", validation, "--tokens", options.tokens, "--seq-length", options.seq_length),
            *("--validation-tokens", options.validation_tokens),
        )


def _command(result: Path, *arguments: object) -> Job:
    return _job(result, "-m", "emo_megatron", *arguments)


def _job(result: Path, *arguments: object) -> Job:
    command = [str(part) for part in (sys.executable, *arguments, "--output", result)]
    title = f"{result.parent.name}: {result.stem}"
    return Job(title=title, command=command, log=result.with_suffix(".log"), is_finished=result.exists)


def rows(options: Options) -> list[dict[str, Any]]:
    """One row per measurement; the loss increase is over the same module as it is stored."""
    found: list[dict[str, Any]] = []
    for one in measurements(options):
        measured = read_object(one.file, kind="a measured loss")
        row = {"domain": one.domain, "model": one.model, "format": one.format} | measured
        stored = next((r["nats"] for r in found if (r["domain"], r["model"]) == (one.domain, one.model)), None)
        if stored is not None and "nats" in row:
            row["increase"] = row["nats"] - stored
        found.append(row)
    return found


def page(found: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---|---|---|--:|--:|--:|--:|"]
    for row in found:
        loss = f"{row['nats']:.4f}" if "nats" in row else "needs a GPU"
        increase = f"{row['increase']:+.4f}" if "increase" in row else ""
        numbers = [str(row[name] or "") for name in ("quantizers", "quantizers_of_experts")]
        lines.append(f"| {' | '.join([row['domain'], row['model'], row['format'], loss, increase, *numbers])} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Quantised modules of the demo's EMO

{machine}

Modules of {keep} of the routed experts, chosen by mean router probability on {tokens} tokens of the domain. Losses are
in nats per token over at least {validation_tokens} validation tokens per domain, in whole documents. The loss
increase is over the same module as it is stored. The quantisation is simulated: int8, fp8 and nvfp4 round weights and
inputs, int4 rounds weights only.

"""


def describe() -> dict[str, str]:
    """The machine and the versions, ModelOpt's and transformers' too."""
    find_modelopt()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = collect_environment()["versions"]
    more = {name: versions[name]["version"] for name in ("transformers", "nvidia-modelopt")}
    return describe_machine(device, threads=torch.get_num_threads()) | more


def main(options: Options) -> None:
    """Run what is missing, and write the results."""
    if not (options.run / "retention.json").exists():
        print(f"{options.run} holds no finished demo: run `make demo` first")
        return
    described = describe()
    settings = {name: getattr(options, name) for name in ("keep", "tokens", "validation_tokens", "seq_length")}
    versions = {name: described[name] for name in VERSIONS}
    # files of another setting must not become numbers of this one
    made_with = {"demo": read_object(options.run / "demo.json", kind="the settings of a run")}
    claim_results(options.output, made_with | settings | versions)
    for domain in options.domains:
        (options.output / domain).mkdir(exist_ok=True)
    machine = "\n".join(f"- {name}: {value}" for name, value in described.items())
    run_jobs(list(jobs(options)))
    found = rows(options)
    introduction = INTRODUCTION.format(machine=machine, **vars(options))
    (options.results / "quantize.json").write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "quantize.md").write_text(introduction + page(found), encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    arguments = tyro.cli(Options)
    run_step(lambda: main(arguments))
