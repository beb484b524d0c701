"""How does the update of a module change the loss on other domains? Fine-tune on a new domain, merge back, and measure.

    make demo && .venv/bin/python benchmarks/update_module.py

Takes the demo's EMO and standard MoE, chooses a quarter of the experts for Perl text, and trains every kind of update
for the same number of steps: all weights; the chosen experts inside the full model; the module alone (experts, experts
and router, or LoRA in Hugging Face peft), merged back whole or in part. Measures, for each update, the loss decrease on
Perl and the loss increase on the demo's eight domains. Writes update-module.md into benchmarks/results, and update.md,
with the domain that loses most, into --output. An interrupted run resumes.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro
from claims import claim_results
from safetensors.torch import save_file
from train_lora import EXPERTS
from train_lora import Options as Adapter
from update_page import Update, dates_of, long_table, page, rate_text, versions

from demo.corpus import EOD_TOKEN, Corpus, CorpusConfig, clean, split_documents
from demo.jobs import Job, run_jobs
from demo.recipe import PRETRAIN, Size, main_models, megatron_flags, run_step
from demo.sources import Machine, perl
from emo_megatron.json_files import read_object
from emo_megatron.report.rows import load_rows
from emo_megatron.runners.launch import python

DOMAIN = "perl"
CALIBRATION_TOKENS = 8192
BLENDS = (1.0, 0.5, 0.25)
SCHEDULES = ("--pool-min-decay-samples", "--pool-delay-samples")
HERE = Path(__file__).resolve().parent
LORA_RATES = (1e-3, 4e-3)
"""Learning rates with which an adapter is trained."""
LORA_RATE = 4e-3
"""The rate whose adapters are merged into the parents: the one with the lower Perl loss for EMO's module."""
FAST = f"alone-{LORA_RATE:g}"
"""Folder of the module whose experts are trained with that rate too."""
MODELS = ("emo", "standard")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Update modules of the demo's models."""

    run: Path = Path("runs/demo")
    """Folder of a finished demo."""
    output: Path = Path("runs/update")
    steps: int = 60
    lr: float = 1e-3
    """Falls linearly to a tenth; pretraining ended at 3e-4."""
    num_kept: int | None = None
    """Routed experts per layer of the module. Default: a quarter of the demo's."""
    results: Path = HERE / "results"
    """Folder for update-module.md."""

    @property
    def warmup(self) -> int:
        """Steps of the warm-up: four, and fewer than there are."""
        return min(4, self.steps // 2)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A checkpoint to measure, and how it was made."""

    update: Update
    path: Path

    @property
    def name(self) -> str:
        """Of the folder of its losses."""
        return self.update.name


def prepare(options: Options, corpus: Corpus) -> Path:
    """Perl in the demo's tokens beside the demo's validation text; the folder."""
    from transformers import AutoTokenizer

    from emo_megatron.mcore.dataset import write_indexed_dataset

    folder = options.output / "corpus"
    if (folder / "corpus.json").exists():
        return folder
    config = CorpusConfig()
    rng = random.Random("update")
    texts = {clean(t, max_chars=config.max_document_chars) for t in perl(Machine(), rng=rng)}
    documents = sorted(t for t in texts if len(t) >= config.min_document_chars)
    rng.shuffle(documents)
    tokenizer = AutoTokenizer.from_pretrained(corpus.path / "tokenizer")
    shutil.copytree(corpus.path / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    for split, chosen in split_documents(documents, config=config).items():
        tokens = [[*tokenizer(text)["input_ids"], EOD_TOKEN] for text in chosen]
        if split == "train":
            write_indexed_dataset(folder / "train", tokens, vocab_size=corpus.manifest["vocab_size"])
            continue
        shutil.copytree(corpus.path / split, folder / split, dirs_exist_ok=True)
        ends = torch.tensor([0, *map(len, tokens)]).cumsum(0).int()
        flat = torch.tensor([t for document in tokens for t in document], dtype=torch.int32)
        tensors = {"tokens": flat, "cu_seqlens": ends}
        save_file(tensors, folder / split / f"{DOMAIN}.safetensors")
    manifest = {
        "eod_token": EOD_TOKEN,
        "domains": dict.fromkeys([*corpus.domains, DOMAIN]),
        "documents": len(documents),
    }
    (folder / "corpus.json").write_text(json.dumps(manifest))
    return folder


def size_and_seed(run: Path) -> tuple[Size, int]:
    """Of the models of a finished demo.

    Raises:
        ValueError: another release has made the demo.
    """
    settings = read_object(run / "demo.json", kind="the settings of a run")
    size: dict[str, Any] = settings["size"]
    if size.keys() != {field.name for field in fields(Size)}:
        raise ValueError(
            f"--run must be a demo of this release; {run} is of another. "
            'Run `make demo ARGS="--output runs/new"` and pass --run runs/new'
        )
    return Size(**size), settings["seed"]


class Experiment:
    """The jobs for one of the models of a demo of this size."""

    def __init__(self, model: str, options: Options, folder: Path, *, size: Size, seed: int) -> None:
        self.options, self.folder, self.size = options, folder, size
        self.parent = options.run / model / "checkpoint"
        self.output = options.output / model
        (recipe,) = (m for m in main_models(size, seed=seed) if m.name == model)
        self.flags = functools.partial(megatron_flags, size, recipe, corpus=folder)
        self.selection = self.output / "selection.json"
        self.module = self.output / "module"
        self.num_kept = size.experts // 4 if options.num_kept is None else options.num_kept

    def jobs(self) -> list[Job]:
        """Everything, in order."""
        stats = self.output / "stats.safetensors"
        data = self.folder / "calibration" / f"{DOMAIN}.safetensors"
        jobs = [
            self._command(
                stats,
                *("stats", "--checkpoint", self.parent, "--data", data, "--tokens", CALIBRATION_TOKENS),
                *("--seq-length", self.size.seq_length, "--micro-batch-size", self.size.rows),
            ),
            self._command(self.selection, *("select", "--stats", stats, "--keep", f"{self.num_kept} routed")),
            self._command(self.module, *("extract", "--checkpoint", self.parent, "--selection", self.selection)),
        ]
        # what was trained in the full model goes back in part too: a module of all experts
        everything = self.output / "everything.json"
        jobs.append(self._command(everything, *("select", "--stats", stats, "--keep", "100%")))
        whole = ("--train-selection", self.selection, "--no-save-optim")
        jobs.append(self._training("all", "all", self.parent))
        jobs += self._merges("all", "all", everything)
        jobs.append(self._training("in-place", "experts", self.parent, *whole))
        jobs += self._merges("in-place", "experts", everything)
        small = ("--num-experts", self.num_kept)
        for name, policy in (("alone", "experts"), ("alone-router", "experts+router"), (FAST, "experts")):
            jobs.append(self._training(name, policy, self.module, *small, pools=False))
            jobs += self._merges(name, policy, self.selection)
        jobs += self._adapters()
        jobs += self._merges(_lora(LORA_RATE), "experts", self.selection)
        return jobs + [self._evaluation(variant) for variant in self.variants()]

    def variants(self) -> list[Variant]:
        """What is measured."""
        lr, fast = rate_text(self.options.lr), rate_text(LORA_RATE)
        merged = {
            "all": f"all weights, {lr}",
            "in-place": f"{self.num_kept} experts in place, {lr}",
            "alone": f"module's experts, {lr}, merged back",
            "alone-router": f"module's experts and router, {lr}, merged back",
            FAST: f"module's experts, {fast}, merged back",
            _lora(LORA_RATE): f"module's experts with LoRA, {fast}, merged back",
        }
        alone = {
            "module": "before training",
            "alone": f"experts, {lr}",
            "alone-router": f"experts and router, {lr}",
            FAST: f"experts, {fast}",
            **{_lora(rate): f"LoRA, {rate_text(rate)}" for rate in LORA_RATES},
        }
        updates = [Update(name="parent", trained="untouched parent")]
        for name, trained in merged.items():
            if 1.0 not in _blends(name):
                updates.append(Update(name=name, trained=trained, share=1.0))
            updates += [Update(name=_merged(name, b), trained=trained, share=b) for b in _blends(name)]
        updates += [Update(name=n, trained=f"module alone, {text}", is_alone=True) for n, text in alone.items()]
        return [Variant(update=u, path=self.parent if u.name == "parent" else self.output / u.name) for u in updates]

    def losses(self, variant: Variant) -> dict[str, float]:
        """Validation loss by domain, nats per token."""
        return {row.evaluated_on: row.loss for row in load_rows(self._measured(variant) / "retention.json")}

    def _merges(self, name: str, weights: str, selection: Path) -> list[Job]:
        return [
            self._command(
                self.output / _merged(name, blend),
                *("merge", "--parent", self.parent, "--modules", self.output / name),
                *("--selections", selection, "--weights", weights, "--blend", blend),
            )
            for blend in _blends(name)
        ]

    def _command(self, result: Path, *arguments: object) -> Job:
        command = [sys.executable, "-m", "emo_megatron", *arguments, "--output", result]
        return self._job(result.name, command, leaves=result, log=result.with_name(f"{result.name}.log"))

    def _adapters(self) -> list[Job]:
        """Train an adapter on the exported module with every rate, and merge each adapter into the module."""
        exported = self.output / "hf"
        jobs = [
            self._command(exported, "export", "--checkpoint", self.module, "--tokenizer", self.folder / "tokenizer")
        ]
        for rate in LORA_RATES:
            name = _lora(rate)
            adapter = self.output / f"{name}-adapter"
            flags = ("--folder", exported, "--data", self.folder / "train", "--output", adapter, "--lr", rate)
            flags += ("--steps", self.options.steps, "--warmup", self.options.warmup)
            flags += ("--rows", self.size.rows, "--seq-length", self.size.seq_length)
            command = python(HERE / "train_lora.py", *flags)
            log = self.output / f"{adapter.name}.log"
            jobs.append(self._job(f"training {name}", command, leaves=adapter, log=log))
            jobs.append(self._command(self.output / name, "import", "--folder", exported, "--adapter", adapter))
        return jobs

    def _training(self, name: str, policy: str, start: Path, *extra: object, pools: bool = True) -> Job:
        folder, steps = self.output / name, self.options.steps
        rate = LORA_RATE if name == FAST else self.options.lr
        own: list[object] = ["--load", start, "--save", folder, "--finetune"]
        own += ["--train-only", policy, "--train-iters", steps, "--save-interval", steps]
        own += ["--lr", rate, "--min-lr", rate / 10]
        own += ["--lr-decay-style", "linear", "--lr-warmup-iters", self.options.warmup]
        own += ["--log-interval", 5]
        flags = self.flags(run_dir=folder)
        if pools:
            # pretraining has finished these schedules
            own += [item for flag in SCHEDULES if flag in flags for item in (flag, 0)]
        if not pools and "--pool-min" in flags:
            flags = flags[: flags.index("--pool-min")]
        return self._job(
            f"training {name}",
            python(PRETRAIN, *flags, *own, *extra),
            leaves=folder / "latest_checkpointed_iteration.txt",
            log=folder.with_name(f"{name}.log"),
        )

    def _evaluation(self, variant: Variant) -> Job:
        """The whole model on every domain, none of its experts left out."""
        output = self._measured(variant)
        flags = ("--checkpoint", variant.path, "--data", self.folder / "calibration")
        flags += ("--validation-data", self.folder / "validation", "--output", output, "--keep")
        flags += ("--validation-tokens", self.size.evaluation_tokens, "--micro-batch-size", self.size.rows)
        command = python("-m", "emo_megatron", "retention", *flags)
        log = output.with_name(f"{output.name}.log")
        return self._job(f"measuring {variant.name}", command, leaves=output / "retention.json", log=log)

    def _measured(self, variant: Variant) -> Path:
        return self.output / "measured" / variant.name

    def _job(self, title: str, command: list[object], *, leaves: Path, log: Path) -> Job:
        command = [str(part) for part in command]
        return Job(title=f"{self.output.name}: {title}", command=command, log=log, is_finished=leaves.exists)


def _blends(name: str) -> tuple[float, ...]:
    """How far merged; what was trained in the full model is all of the way there already."""
    return BLENDS[1:] if name in ("all", "in-place") else BLENDS


def _merged(name: str, blend: float) -> str:
    """Folder of the parent with an update merged into it."""
    return f"merged-{name}-{blend:g}"


def _lora(rate: float) -> str:
    """Folder of the module with an adapter trained at this rate."""
    return f"lora-{rate:g}"


def write_page(options: Options, losses: dict[str, dict[str, dict[str, float]]], experiment: Experiment) -> str:
    """Write update-module.md; its text. `losses` has model -> update -> domain -> nats per token."""
    size, adapter = experiment.size, Adapter(folder=Path(), data=Path(), output=Path())
    text = page(
        losses,
        [variant.update for variant in experiment.variants()],
        domain=DOMAIN,
        setting={
            "dates": dates_of(options.output.glob("*/measured/*/retention.json")),
            "experts": size.experts,
            "kept": experiment.num_kept,
            "steps": options.steps,
            "step_tokens": size.rows * size.seq_length,
            "lr": rate_text(options.lr),
            "calibration_tokens": CALIBRATION_TOKENS,
            "evaluation_tokens": size.evaluation_tokens,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "targets": " and ".join(f"`{name}`" for name in EXPERTS),
            "rates": " and ".join(map(rate_text, LORA_RATES)),
            "rate": rate_text(LORA_RATE),
        },
    )
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "update-module.md").write_text(text, encoding="utf-8")
    return text


def main(options: Options) -> None:
    """Run what is missing and print the table."""
    if not (options.run / "retention.json").exists():
        print(f"{options.run} holds no finished demo: run `make demo` first")
        return
    manifest = json.loads((options.run / "corpus" / "corpus.json").read_text())
    corpus = Corpus(path=options.run / "corpus", manifest=manifest)
    size, seed = size_and_seed(options.run)
    made_with = {"size": asdict(size), "seed": seed, "text": manifest["fingerprint"]}
    made_with["versions"] = versions("torch", "megatron-core", "transformers", "peft")
    claim_results(options.output, made_with | {name: getattr(options, name) for name in ("steps", "lr", "num_kept")})
    folder = prepare(options, corpus)
    experiments = [Experiment(name, options, folder, size=size, seed=seed) for name in MODELS]
    for experiment in experiments:
        experiment.output.mkdir(parents=True, exist_ok=True)
        run_jobs(experiment.jobs())
    losses = {e.output.name: {v.name: e.losses(v) for v in e.variants()} for e in experiments}
    print(write_page(options, losses, experiments[0]))
    (options.output / "update.md").write_text(long_table(losses, domain=DOMAIN), encoding="utf-8")


if __name__ == "__main__":
    run_step(lambda: main(tyro.cli(Options)))
