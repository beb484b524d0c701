"""The processes of peers.py: who chooses experts, how each process is started and measured, and what each has kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "peers"
INSTALLED = HERE.parent / ".venv" / "peers"
"""Folder of `make peers`."""
GATE = "model.layers.{}.mlp.gate.weight"
OURS = "emo_megatron"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every process is given."""

    model: Path
    """Hugging Face folder of the parent."""
    documents: Path
    """Folder of documents.json and documents.safetensors."""
    keep: int
    """Routed experts per layer."""
    seq_length: int


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """A process that chooses experts."""

    project: str
    method: str
    ours: str
    """The method of `select` that computes the same score."""
    script: tuple[str, ...] = ()
    """File in peers/, and its arguments; none: `select` itself."""
    packages: str = ""
    """Folder of `make peers`."""
    source: str = ""
    """Name in peers/sources.txt of the repository whose code runs."""
    is_recorded: bool = False
    """Whether this project records the values that the peer then reads."""

    @property
    def name(self) -> str:
        """For files."""
        return re.sub(r"[^a-z_]+", "-", f"{self.project}-{self.method}".lower())


PEERS = (
    Chooser(
        project="llm-compressor", method="REAP", ours="reap", script=("llm_compressor.py",), packages="llm-compressor"
    ),
    Chooser(
        project="CerebrasResearch/reap",
        method="REAP",
        ours="reap",
        script=("reap_prune.py",),
        packages="reap",
        source="reap",
    ),
    Chooser(
        project="allenai/EMO",
        method="EASY-EP",
        ours="easy_ep",
        script=("emo_prune.py", "easy_ep"),
        packages="emo",
        source="EMO",
    ),
    Chooser(
        project="RUCAIBox/EASYEP, without one line",
        method="EASY-EP",
        ours="easy_ep",
        script=("easyep_select.py", "--mended"),
        packages="emo",
        source="EASYEP",
        is_recorded=True,
    ),
    Chooser(
        project="allenai/EMO",
        method="greedy by layer",
        ours="layerwise",
        script=("emo_prune.py", "greedy"),
        packages="emo",
        source="EMO",
    ),
)
OWN = tuple(Chooser(project=OURS, method=name, ours=name) for name in ("reap", "easy_ep", "layerwise", "mean_prob"))


def commits() -> dict[str, str]:
    """Name -> commit of the repositories that `make peers` has cloned.

    Raises:
        ValueError: `make peers` has not run to its end, or files of a repository are not those of the commit.
    """
    if not (INSTALLED / ".installed").exists():
        raise ValueError(f"{INSTALLED} must hold the other projects: call `make peers`")
    found = {}
    for line in (SCRIPTS / "sources.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        name, address, commit, *folders = line.split()
        clone = INSTALLED / "sources" / name
        command = ["git", "-C", str(clone), "diff", "--quiet", commit, "--", *folders]
        if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
            raise ValueError(
                f"{clone} must hold {' '.join(folders)} of {address} at {commit}, unchanged: delete {INSTALLED}, then "
                "call `make peers`"
            )
        found[name] = commit
    return found


def packages() -> dict[str, str]:
    """Folder of packages -> the versions in it that matter most."""
    found = {}
    for name in sorted({peer.packages for peer in PEERS}):
        versions = {d.name: d.version for d in importlib.metadata.distributions(path=[str(INSTALLED / name)])}
        found[name] = ", ".join(f"{d} {versions[d]}" for d in ("llmcompressor", "transformers") if d in versions)
    return found


def failures(task: Task, output: Path) -> dict[str, str]:
    """File of RUCAIBox/EASYEP that ends in an error as published -> the last line of its output; "" if it ran."""
    output.mkdir(parents=True, exist_ok=True)
    clone = INSTALLED / "sources" / "EASYEP"
    given = ["--model", task.model, "--documents", task.documents / "documents.json", "--keep", task.keep]
    commands = {
        "pruning/inf_new.py": [clone / "pruning" / "inf_new.py", "--ckpt-path", "x", "--config", "x"],
        "pruning/expert_selection.py": [SCRIPTS / "easyep_select.py", *given],
    }
    found = {}
    for name, command in commands.items():
        result = output / Path(name).stem
        shutil.rmtree(result, ignore_errors=True)
        words = [str(part) for part in (sys.executable, *command, "--output", result)]
        measured = run_measured(words, environment=environment_of("emo", "EASYEP"), log=result.with_suffix(".log"))
        found[name] = measured.get("error", "")
    return found


def command_of(chooser: Chooser, task: Task, output: Path) -> list[str]:
    """The process that chooses."""
    if not chooser.script:
        documents = task.documents / "documents.safetensors"
        arguments: list[object] = ["select", "--checkpoint", task.model, "--data", documents, "--no-cache"]
        arguments += ["--seq-length", task.seq_length, "--method", chooser.ours]
        arguments += ["--keep", f"{task.keep} routed", "--output", output]
        return [str(part) for part in (sys.executable, "-m", OURS, *arguments)]
    script, *more = chooser.script
    arguments = ["--model", task.model, "--documents", task.documents / "documents.json", "--keep", task.keep]
    return [str(part) for part in (sys.executable, SCRIPTS / script, *more, *arguments, "--output", output)]


def environment_of(packages: str, source: str) -> dict[str, str]:
    """The packages and the clone of a peer come before the packages of the project."""
    path = [INSTALLED / packages] if packages else [HERE.parent]
    if source:
        path.append(INSTALLED / "sources" / source)
    if source == "reap":
        path[-1] /= "src"
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_measured(command: Sequence[str], *, environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a process: its CPU seconds, its peak memory in MiB, and its last line if it failed."""
    measured = log.with_suffix(".measured.json")
    measured.unlink(missing_ok=True)
    words = [sys.executable, str(SCRIPTS / "measured.py"), str(measured), *command]
    with log.open("w", encoding="utf-8") as file:
        # a session of its own, so that both processes end together
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"error": (lines or [f"exit status {process.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return found


def kept_in(folder: Path, *, parent: Path) -> list[list[int]]:
    """For each layer, the experts of the parent that the module of a peer has.

    The folder lists the experts in kept.json, or holds a model whose router rows are rows of the parent.
    """
    if (folder / "kept.json").exists():
        return json.loads((folder / "kept.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    found = []
    with (
        safe_open(parent / "model.safetensors", framework="pt") as whole_model,
        safe_open(folder / "model.safetensors", framework="pt") as module,
    ):
        for layer in range(sum(name.endswith("mlp.gate.weight") for name in module.keys())):  # noqa: SIM118
            row_EH, kept_KH = whole_model.get_tensor(GATE.format(layer)), module.get_tensor(GATE.format(layer))
            equal_KE = (kept_KH[:, None] == row_EH.to(kept_KH.dtype)).all(-1)
            if not (equal_KE.sum(-1) == 1).all():
                raise ValueError(
                    f"every router row of {folder}, layer {layer + 1}, must be one row of {parent}: delete "
                    "the folder, and call this script again"
                )
            found.append(sorted(equal_KE.int().argmax(-1).tolist()))
    return found
