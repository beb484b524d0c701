"""How does EMO's loss change if load is balanced over less than the whole batch? EMO, balanced three ways.

    .venv/bin/python benchmarks/balance_kinds.py --corpus runs/demo/corpus

The models have the same text, seed, pools, coefficient and other settings. The size of the micro-batches changes only
the tokens over which `aux_loss` balances. The benchmark measures the same numbers as the demo: the loss of the whole
model, and of each domain's modules on that domain. After an interruption, the same command resumes.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro
from fidelity_text import open_corpus
from timing import RESULTS, describe_machine, markdown_table, run_script, write_results

from demo.jobs import Job, run_jobs
from demo.recipe import PRETRAIN, Model, Size, main_models, megatron_flags, retention_flags
from demo.settings import BASE, QUICK_BASE
from emo_megatron.commands import retention
from emo_megatron.report.rows import CHOSEN, RANDOM, RetentionSummary, load_rows, summarise
from emo_megatron.report.rows import FULL as WHOLE
from emo_megatron.runners.launch import python

KINDS = {
    "global": ("global_aux_loss: the whole batch", ()),
    "rows": (
        "aux_loss: every row by itself",
        ("--moe-router-load-balancing-type", "aux_loss", "--micro-batch-size", "1"),
    ),
    "documents": ("seq_aux_loss: every document in its pool", ("--moe-router-load-balancing-type", "seq_aux_loss")),
}
"""Name of the run -> what is balanced, and the flags in addition to those of EMO."""
FRACTIONS = (0.25, 0.125)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pretrain EMO under each kind of balance and compare modules."""

    corpus: Path
    """A prepared corpus: the folder `corpus` of a demo, which need not be finished."""
    runs: Path = Path("runs/balance")
    """Folder for checkpoints, logs and measurements."""
    steps: int = 300
    """Optimizer steps for which the schedules are made; the demo has 800."""
    stop: int | None = None
    """Steps after which training ends; must be a multiple of a quarter of --steps. None: all steps."""
    evaluation_tokens: int = 8192
    """Validation tokens per domain; the demo has 16384."""
    seed: int = 1234
    quick: bool = False
    """Only test that everything runs; the models are too small for meaningful results."""
    output: Path = RESULTS
    """Folder of the page and the CSV."""

    def __post_init__(self) -> None:
        for name in ("steps", "evaluation_tokens", "seed"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")

        every = max(1, self.steps // 4)
        if self.stop is not None and (self.quick or self.stop > self.steps or self.stop % every):
            raise ValueError(
                f"--stop must be a multiple of {every}, a quarter of --steps, at most {self.steps}, and goes without "
                f"--quick; got {self.stop}"
            )

    @property
    def size(self) -> Size:
        """Of models, training and measurement: the demo's earlier setting, see docs/experiments.md."""
        if self.quick:
            return dataclasses.replace(QUICK_BASE, steps=4, fractions=(0.25,), evaluation_tokens=512)
        return dataclasses.replace(
            BASE, steps=self.steps, fractions=FRACTIONS, evaluation_tokens=self.evaluation_tokens
        )


def main(options: Options) -> list[Path]:
    """Train and measure what is missing.

    Returns:
        The CSV and the page.
    """
    os.environ.setdefault("EMO_DEVICE", "cpu")
    metadata = describe_machine(torch.device("cpu"), threads=1)
    size, corpus, runs = options.size, open_corpus(options.corpus).path.resolve(), options.runs.resolve()
    last = size.steps if options.stop is None else options.stop
    emo, *_ = main_models(size, seed=options.seed)
    models = [
        Model(name=name, flags=(*emo.flags, *flags, "--exit-interval", str(last)), seed=options.seed)
        for name, (_, flags) in KINDS.items()
    ]
    run_jobs([_training(model, size, last, corpus, runs) for model in models])
    rows: list[dict[str, Any]] = []
    for model in models:
        checkpoint = runs / model.name / "checkpoint" / f"iter_{last:07d}"
        # as the demo measures, but modules are tried on one other domain each
        asked = retention_flags(size, model, corpus=corpus, run_dir=runs / model.name)
        asked += ["--checkpoint", str(checkpoint), "--num-other-domains", "1"]
        folder = retention.run(tyro.cli(retention.Options, args=asked))
        found = load_rows(folder / "retention.json")
        rows += [_row(model.name, summary, last) for summary in summarise(found)]
    flags = megatron_flags(size, emo, corpus=Path("CORPUS"), run_dir=Path("RUN"))
    page = _page(rows, metadata, size, flags)
    name = "balance-kinds" + ("-quick" if options.quick else "")
    return write_results(options.output, name, rows=rows, page=page)


def _training(model: Model, size: Size, last: int, corpus: Path, runs: Path) -> Job:
    folder = runs / model.name
    tracker = folder / "checkpoint" / "latest_checkpointed_iteration.txt"
    return Job(
        title=f"pretraining {model.name}",
        command=python(PRETRAIN, *megatron_flags(size, model, corpus=corpus, run_dir=folder)),
        log=folder / "train.log",
        is_finished=lambda: tracker.exists() and int(tracker.read_text()) >= last,
    )


def _row(name: str, found: RetentionSummary, steps: int) -> dict[str, Any]:
    """Of the CSV."""
    numbers = {n: getattr(found, n) for n in ("loss", "loss_increase", "selectivity")}
    return {
        "run": name,
        "balance": KINDS[name][0],
        "steps": steps,
        "experts": found.num_experts_kept,
        "method": found.method,
        **{n: "" if value is None else round(value, 4) for n, value in numbers.items()},
    }


def _page(rows: Sequence[dict[str, Any]], metadata: dict[str, str], size: Size, flags: Sequence[str]) -> str:
    """The page: per kind of balance, the loss of the full model and of modules, with the loss increase in brackets."""
    kept = [round(fraction * size.experts) for fraction in size.fractions]
    head = ["balance", f"all {size.experts}"]
    for number in kept:
        head += [f"{number} of its domain", f"{number} at random"]
    table = []
    for name, (balance, _) in KINDS.items():
        found = {(row["experts"], row["method"]): row for row in rows if row["run"] == name}
        line = [balance, f"{found[size.experts, WHOLE]['loss']:.3f}"]
        for number in kept:
            sets = (found[number, method] for method in (CHOSEN, RANDOM))
            line += [f"{row['loss']:.3f} ({row['loss_increase']:+.3f})" for row in sets]
        table.append([*line, f"{found[kept[0], CHOSEN]['selectivity']:+.3f}"])
    head.append(f"selectivity of {kept[0]}")
    differing = [f"- {balance}: `{shlex.join(added) or 'none'}`" for balance, added in KINDS.values()]
    return "\n".join(
        [
            "# Kinds of balance\n",
            "\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n",
            f"EMO with the demo's earlier setting, {rows[0]['steps']} of {size.steps} steps of {size.rows} rows "
            f"of {size.seq_length} tokens, {size.evaluation_tokens} validation tokens per domain; "
            f"{retention.versions()}. Loss: nats per token. Each domain keeps the experts that it uses most; the table "
            "shows means over domains. In brackets: "
            "the loss increase from dropping the other experts. "
            "Selectivity: loss increase on one other domain, the next by name, minus that on the own domain.\n",
            markdown_table(head, table),
            "Flags in addition to the common flags:\n",
            "\n".join(differing) + "\n",
            "Common flags:\n",
            f"```\nexamples/pretrain_emo.py {shlex.join(flags)}\n```\n",
        ]
    )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
