"""How much loss do modules have if other projects choose the experts? A quarter of the experts, several domains.

    make demo && make peers && .venv/bin/python benchmarks/peers.py

Exports the demo's EMO and standard MoE, lets each peer choose experts on the same tokens, and lets `select` choose with
the same method. Measures the loss of every module, and the time and memory of every process. Writes peers.json and
peers.md into benchmarks/results. An interrupted run resumes.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro
from claims import claim_results
from peer_processes import (
    OURS,
    OWN,
    PEERS,
    SCRIPTS,
    Chooser,
    Task,
    command_of,
    commits,
    environment_of,
    failures,
    kept_in,
    packages,
    run_measured,
)
from safetensors import safe_open
from safetensors.torch import save_file
from timing import describe_machine
from tqdm import tqdm

from demo.recipe import run_step
from emo_megatron.environment import collect_environment
from emo_megatron.experts.calibration import Calibration
from emo_megatron.experts.selection import load_selection
from emo_megatron.files import whole
from emo_megatron.json_files import read_object, to_json

TITLES = {"emo": "EMO", "standard": "standard"}
"""Models of the demo -> names in the table."""
LARGEST_DIFFERENCE = 0.01
"""Nats per token between a module that a peer wrote and the parent limited to the same experts; some are bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare modules chosen by other projects with those of `select`."""

    run: Path = Path("runs/demo")
    """Folder of a finished demo."""
    output: Path = Path("runs/peers")
    """Folder for exported models, modules and losses."""
    results: Path = SCRIPTS.parent / "results"
    """Folder for peers.json and peers.md."""
    domains: tuple[str, ...] = ("python", "fr", "man", "javascript")
    keep: int = 16
    """Routed experts per layer of a module."""
    tokens: int = 8192
    """Calibration tokens per domain."""
    validation_tokens: int = 16384
    """Validation tokens per domain."""
    seq_length: int = 256


def prepare_documents(corpus: Path, options: Options, domain: str) -> Path:
    """The calibration documents, cut to the sequence length, as tokens and as text; the folder of both files.

    Some peers take text and some take tokens, so a piece is used only if the tokenizer turns its text into its tokens.
    """
    from transformers import AutoTokenizer

    folder = options.output / "documents" / domain
    if (folder / "documents.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    with safe_open(corpus / "calibration" / f"{domain}.safetensors", framework="pt") as file:
        ends, tokens = file.get_tensor("cu_seqlens").tolist(), file.get_tensor("tokens").tolist()
    pieces: list[list[int]] = []
    num_tokens = 0
    for start, end in itertools.pairwise(ends):
        for at in range(start, end, options.seq_length):
            piece = tokens[at : min(end, at + options.seq_length)]
            fits = len(piece) > 1 and tokenizer(tokenizer.decode(piece))["input_ids"] == piece
            if fits and num_tokens < options.tokens:
                pieces.append(piece)
                num_tokens += len(piece)
    flat = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *map(len, pieces)]).cumsum(0).int()
    save_file({"tokens": flat, "cu_seqlens": cu_seqlens}, folder / "documents.safetensors")
    content = {"tokens": pieces, "texts": [tokenizer.decode(piece) for piece in pieces]}
    with whole(folder / "documents.json") as path:
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def choose(chooser: Chooser, task: Task, folder: Path) -> dict[str, Any]:
    """Let one process choose: the kept experts, CPU seconds and memory, kept in a file for the next call."""
    result, output = folder / f"{chooser.name}.json", folder / chooser.name
    if result.exists():
        return read_object(result, kind="a choice of experts")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{chooser.name}.log"
    environment = environment_of(chooser.packages, chooser.source)
    # what an interrupted process has left
    shutil.rmtree(output, ignore_errors=True)
    output.unlink(missing_ok=True)
    found = run_measured(command_of(chooser, task, output), environment=environment, log=log)
    if "error" in found:
        raise ValueError(
            f"{chooser.project} must choose experts by {chooser.method}, and failed: {found['error']}. Read {log}, "
            "mend the cause, and call this script again"
        )
    found["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    found["kept"] = kept_in(output, parent=task.model) if chooser.script else load_selection(output).experts
    with whole(result) as path:
        path.write_text(to_json(found), encoding="utf-8")
    return read_object(result, kind="a choice of experts")


class Losses:
    """Losses of one exported model and of modules of it, on the validation text of the domains."""

    def __init__(self, model: Path, *, corpus: Path, options: Options) -> None:
        from emo_megatron.runners.open import open_hugging_face

        self._corpus, self._options, self._open = corpus, options, open_hugging_face
        self._runner, self._read = self._opened(model)
        self._file = model.with_name("losses.json")
        self._known = read_object(self._file, kind="losses") if self._file.exists() else {}

    def of(self, domain: str, kept: list[list[int]] | None, *, folder: Path | None = None) -> float:
        """Nats per token with these experts, or with all; with `folder`, those of the model in that folder."""
        key = f"{domain} {kept} {folder or ''}"
        if key not in self._known:
            runner = self._runner if folder is None else self._opened(folder)[0]
            calibration = Calibration(num_tokens=self._options.validation_tokens)
            documents = self._read(self._corpus / "validation" / f"{domain}.safetensors", calibration).tokens
            self._known[key] = runner.loss(documents, allowed_LE=self._mask(kept)).nats
            with whole(self._file) as path:
                path.write_text(to_json(self._known, indent=1), encoding="utf-8")
        return self._known[key]  # type: ignore[no-any-return]

    def _mask(self, kept: list[list[int]] | None) -> torch.Tensor | None:
        if kept is None:
            return None
        mask_LE = torch.zeros(len(kept), self._runner.metadata.num_experts, dtype=torch.bool)
        for layer, experts in enumerate(kept):
            mask_LE[layer, experts] = True
        return mask_LE

    def _opened(self, folder: Path) -> tuple[Any, Any]:
        return self._open(folder, texts=[], tokenizer=None, seq_length=self._options.seq_length, micro_batch_size=8)


def shared(kept: list[list[int]], other: list[list[int]]) -> float:
    """Share of the experts of one choice that another choice keeps too."""
    return sum(len(set(a) & set(b)) for a, b in zip(kept, other, strict=True)) / sum(map(len, kept))


def measure(options: Options, *, model: str) -> list[dict[str, Any]]:
    """One row per domain and process."""
    folder, corpus = options.output / model, options.run / "corpus"
    losses = Losses(folder / "hf", corpus=corpus, options=options)
    found = []
    for domain in options.domains:
        documents = prepare_documents(corpus, options, domain)
        task = Task(model=folder / "hf", documents=documents, keep=options.keep, seq_length=options.seq_length)
        own = {chooser.ours: choose(chooser, task, folder / domain) for chooser in OWN}
        full = losses.of(domain, None)
        with safe_open(documents / "documents.safetensors", framework="pt") as file:
            num_tokens = file.get_tensor("tokens").numel()
        for chooser in tqdm((*PEERS, *OWN), desc=f"{model}, {domain}", unit="process", disable=None):
            choice = choose(chooser, task, folder / domain)
            nats = losses.of(domain, choice["kept"])
            module = folder / domain / chooser.name
            if (module / "model.safetensors").exists():
                written = losses.of(domain, None, folder=module)
                if abs(written - nats) > LARGEST_DIFFERENCE:
                    raise ValueError(
                        f"{module} must have the loss of the parent with the same experts, {nats:.4f}, within "
                        f"{LARGEST_DIFFERENCE}; got {written:.4f}: delete {folder / domain}, and call this script again"
                    )
            found.append(
                {"model": model, "domain": domain, "project": chooser.project, "method": chooser.method}
                | {"ours": chooser.ours, "nats": nats, "increase": nats - full, "kept": choice["kept"]}
                | {"shared": shared(choice["kept"], own[chooser.ours]["kept"]), "peak_mib": choice["peak_mib"]}
                | {"date": choice["date"], "num_tokens": num_tokens}
                | {"cpu_ratio": choice["cpu_seconds"] / own[chooser.ours]["cpu_seconds"]}
            )
    return found


def page(found: list[dict[str, Any]]) -> str:
    """The table: means over the domains, and over both models the median ratio of times and the largest memory."""
    models = list(dict.fromkeys(row["model"] for row in found))
    heads = [f"{TITLES[model]}: {name}" for model in models for name in ("loss increase", "same experts as `select`")]
    heads = ["chosen by", "method", *heads, "CPU time", "memory (MiB)"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["project"], row["method"]), []).append(row)
    for (project, method), rows in groups.items():
        is_own = project == OURS
        cells = [project, f"`{method}`" if is_own else method]
        for model in models:
            of_model = [row for row in rows if row["model"] == model]
            increase, equal = (statistics.mean(row[name] for row in of_model) for name in ("increase", "shared"))
            cells += [f"{increase:+.3f}", "" if is_own else f"{equal:.0%}"]
        ratio, memory = statistics.median(row["cpu_ratio"] for row in rows), max(row["peak_mib"] for row in rows)
        # most of the work of this process is not the peer's
        is_recorded = any(peer.is_recorded and peer.project == project for peer in PEERS)
        cells += ["", ""] if is_recorded else ["1" if is_own else f"{ratio:.1f}", f"{memory:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Modules chosen by other projects

{machine}
- choices made: {dates} UTC

Every process chose {keep} routed experts per layer of the demo's models, exported to Hugging Face, on the same tokens:
{counts} per domain, in documents of at most {seq_length} tokens. A document is left out if
the tokenizer does not turn its text into the same tokens again.

- *Loss increase*: nats per token over {validation_tokens} validation tokens of the domain, against the whole model; the
  mean over {domains}.
- *Same experts as `select`*: the share of the chosen experts that `select` chooses too, with the same method.
- *CPU time*: of the whole process, divided by that of `select`; the median. The peers write the module, and `select`
  writes a list of experts. The processes ran with one thread each, beside other work.
- *Memory*: the largest peak of the process.

The modules that peers wrote were measured too: each has the loss of the parent with the same experts, within
{difference} nats.

"""
NOTES = """
## What the peers ran with

All peers ran with the torch of this project. The files of the peers are not changed, but one line of RUCAIBox/EASYEP is
left out when the file runs. Settings are the authors' defaults, apart from the size, the method and these:

- **llm-compressor**: nothing replaced. It prunes a layer before it measures the next layer.
- **CerebrasResearch/reap**: the entries of Qwen2-MoE in its three tables of models and data sets are added at run time,
  as its README describes for new models. The modules `vllm` and `reap.eval`, which only prompts and evaluation use, are
  empty. Without profiling and without the values for merging experts.
- **allenai/EMO**: written for EMO's own model class, which has no renormalised gates beside a shared expert. Here the
  scripts run on Qwen2-MoE: a layer returns an object with `detach`, a block states 0 shared experts among the routed
  experts, and the module that loads evaluation tasks returns the documents. Both scripts compute in bfloat16.
- **RUCAIBox/EASYEP**: the first stage is replaced, because it runs DeepSeek-R1 on CUDA devices:
  `benchmarks/peers/easyep_select.py` records the same values here. Time and memory would be those of this recording.
  The second stage uses the 25 longest documents.

## What does not run as published

Files of RUCAIBox/EASYEP, and the last line of their output on this machine:

{lines}

`expert_selection.py` imports json a second time inside main(). The row in the table is without this line.
"""


def describe() -> dict[str, str]:
    """The machine, the versions, and the commits and packages of the peers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine(device, threads=1)
    machine["transformers"] = collect_environment()["versions"]["transformers"]["version"]
    return machine | {f"packages of {name}": versions for name, versions in packages().items()}


def main(options: Options) -> None:
    """Run what is missing, and write the results."""
    if not (options.run / "retention.json").exists():
        print(f"{options.run} holds no finished demo: run `make demo` first")
        return
    cloned = {f"commit of {name}": commit for name, commit in commits().items()}
    installed = packages()
    machine = describe() | cloned
    names = ("keep", "tokens", "validation_tokens", "seq_length")
    made_with = {"demo": read_object(options.run / "demo.json", kind="the settings of a run")}
    claim_results(options.output, made_with | cloned | installed | {name: getattr(options, name) for name in names})
    found = []
    for model in TITLES:
        hf = options.output / model / "hf"
        if not hf.exists():
            checkpoint, tokenizer = options.run / model / "checkpoint", options.run / "corpus" / "tokenizer"
            command = [sys.executable, "-m", OURS, "export", "--checkpoint", checkpoint, "--tokenizer", tokenizer]
            subprocess.run([str(part) for part in (*command, "--output", hf)], check=True)
        found += measure(options, model=model)
    documents = options.output / "documents" / options.domains[0]
    task = Task(model=hf, documents=documents, keep=options.keep, seq_length=options.seq_length)
    errors = failures(task, options.output / "failures")
    lines = "\n".join(f"- `{name}`: `{error}`" if error else f"- `{name}` ran" for name, error in errors.items())
    dates, counts = sorted({row["date"] for row in found}), sorted({row["num_tokens"] for row in found})
    texts: dict[str, Any] = {"difference": LARGEST_DIFFERENCE} | vars(options)
    texts["machine"] = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    texts |= {"dates": f"{dates[0]} to {dates[-1]}", "counts": f"{counts[0]} to {counts[-1]}"}
    texts["domains"] = ", ".join(options.domains)
    content = INTRODUCTION.format(**texts) + page(found) + NOTES.format(lines=lines)
    for name, text in {"peers.json": to_json(found, indent=None) + "\n", "peers.md": content}.items():
        with whole(options.results / name) as path:
            path.write_text(text, encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    arguments = tyro.cli(Options)
    run_step(lambda: main(arguments))
