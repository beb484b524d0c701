"""The demo: pretrain EMO and a standard MoE through Megatron on real text, cut modules out, show what they keep.

Every step leaves files in the output folder and is skipped when they are there, so an interrupted demo goes on where
it was.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_megatron.commands.retention import versions
from emo_megatron.commands.retention_options import RetentionOptions
from emo_megatron.config import PoolDocuments
from emo_megatron.demo import corpus as corpora
from emo_megatron.demo.jobs import Job, last_iteration, run_chains
from emo_megatron.demo.prepared import Corpus
from emo_megatron.demo.recipe import FULL, QUICK, Model, Size, extra_models, main_models, megatron_flags
from emo_megatron.files import whole
from emo_megatron.json_files import read_object
from emo_megatron.report import retention
from emo_megatron.runners.launch import python, step_arguments
from emo_megatron.runners.retention import conditions, read_rows

CROSS = 0.25
"""Fraction of the experts whose modules are tried on every other domain."""
ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "examples" / "pretrain_emo.py"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Pretrain three small models on text this machine already has and show what a quarter of their experts keeps."""

    output: Path | None = None
    """Folder of the run, runs/demo or runs/demo-quick if not given; an interrupted run in it is continued."""
    corpus: Path | None = None
    """Folder with one folder of text files a domain. Default: text found on this machine."""
    quick: bool = False
    """A run of about two minutes that shows the mechanics; its models are too small to show the effect."""
    extra: bool = False
    """Also train a second seed and two ablations (about three times as long)."""
    pool_documents: PoolDocuments = "attention"
    """attention: attention and routers keep to documents. routers: attention runs across them, in every model."""
    seed: int = 1234
    """Of initialisation, data order and pool sizes."""
    processes: int = 2
    """Processes side by side, one thread each."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes must be at least 1; got {self.processes}")
        # Megatron's bounds, of which --extra wants the next one, too
        if not 1 <= self.seed < 2**31:
            raise ValueError(f"--seed must lie in [1, 2^31); got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        default = Path("runs") / ("demo-quick" if self.quick else "demo")
        return (self.output or default).resolve()


def run_demo(config: DemoConfig) -> Path:
    """Run or continue the demo and print its table.

    Returns:
        The output folder, with retention.csv, retention.json and retention.png in it.

    Raises:
        ValueError: the corpus is too small, or the folder holds a run with other settings.
        FileNotFoundError: the package is not in a checkout of its repository.
        RuntimeError: a training or evaluation failed; shows the end of its log.
    """
    if not PRETRAIN.exists():
        raise FileNotFoundError(
            f"the demo trains through {PRETRAIN}, which is part of the repository: run it from a checkout"
        )
    size = dataclasses.replace(QUICK if config.quick else FULL, documents=config.pool_documents)
    output = config.folder
    models = main_models(size, seed=config.seed)
    source = str(config.corpus.resolve()) if config.corpus else None
    settings = {"size": dataclasses.asdict(size), "seed": config.seed, "corpus": source}
    _claim(output, settings | {m.name: " ".join(m.flags) for m in models})
    corpus = corpora.prepare_corpus(
        output / "corpus", corpus_config(config.corpus, seed=config.seed, quick=config.quick)
    )
    _claim(output, {"text": corpus.manifest["fingerprint"]})
    print(corpora.describe(corpus), flush=True)
    if config.extra:
        models += extra_models(size, seed=config.seed)
    print(
        f"training {len(models)} models on {size.tokens / 1e6:.1f}M tokens each, "
        f"{config.processes} side by side; logs are in {output}/<model>/",
        flush=True,
    )
    chains = [
        [_training(model, size, corpus=corpus, output=output), _evaluation(model, size, corpus=corpus, output=output)]
        for model in models
    ]
    run_chains(chains, at_once=config.processes)
    rows = [row for model in models for row in _rows(model, size, corpus=corpus, output=output)]
    _report(rows, output=output, corpus=corpus, size=size)
    return output


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Note what the run in this folder is made of; refuse a folder whose run is made of something else."""
    settings = json.loads(json.dumps(settings))
    path = output / "demo.json"
    found = read_object(path, kind="the settings of a run") if path.exists() else {}
    differing = [f"{name} is {was} there and {now} here" for name, was, now in differences(found, settings)]
    if differing:
        raise ValueError(
            f"{output} holds a run with other settings: {'; '.join(differing)}. "
            "Give another folder with --output, or delete that one."
        )
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(found | settings, indent=1), encoding="utf-8")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Name, value found and value wanted of the settings that both have and that differ, in the order of `wanted`."""
    for name in (name for name in wanted if name in found):
        if isinstance(wanted[name], dict) and isinstance(found[name], dict):
            yield from differences(found[name], wanted[name])
        elif found[name] != wanted[name]:
            yield name, found[name], wanted[name]


def corpus_config(folder: Path | None, *, seed: int, quick: bool) -> corpora.CorpusConfig:
    """What the corpus is made of, from a folder with one folder of text files a domain or from this machine's text."""
    full = corpora.CorpusConfig(corpus_dir=folder, seed=seed)
    if not quick:
        return full
    return dataclasses.replace(full, max_domains=4, bytes_per_domain=300_000, min_documents=60)


def pretraining_flags(model: Model, size: Size, *, corpus: Corpus, run_dir: Path) -> list[str]:
    """What examples/pretrain_emo.py is started with; the checkpoint goes to `run_dir`/checkpoint."""
    return megatron_flags(size, model, tokenizer=corpus.tokenizer_dir, data_prefix=corpus.train_prefix, run_dir=run_dir)


def _training(model: Model, size: Size, *, corpus: Corpus, output: Path) -> Job:
    run_dir = output / model.name
    log = run_dir / "train.log"
    flags = pretraining_flags(model, size, corpus=corpus, run_dir=run_dir)
    tracker = run_dir / "checkpoint" / "latest_checkpointed_iteration.txt"
    return Job(
        title=f"pretraining {model.name}",
        command=python(PRETRAIN, *flags),
        log=log,
        total=size.steps,
        done=lambda: last_iteration(log),
        is_finished=lambda: tracker.exists() and tracker.read_text().strip() == str(size.steps),
    )


def _evaluation(model: Model, size: Size, *, corpus: Corpus, output: Path) -> Job:
    options = retention_options(model, size, corpus=corpus, output=output)
    # the small model is compared whole: it is what a quarter of the experts competes with
    kept = [] if model.name == "small" else [int(text) - size.num_shared for text in options.keep]
    wanted = conditions(
        corpus.domains,
        num_experts=size.experts,
        methods=options.chosen_methods,
        kept=kept,
        crossed=[int(text) - size.num_shared for text in options.crossed],
    )
    total = len(wanted)
    return Job(
        title=f"evaluating {model.name}",
        command=python(*step_arguments("retention", options, checkpoint=options.checkpoint)),
        log=output / model.name / "evaluate.log",
        total=total,
        done=lambda: len(read_rows(options.rows_file)),
        is_finished=lambda: len(read_rows(options.rows_file)) == total,
    )


def retention_options(model: Model, size: Size, *, corpus: Corpus, output: Path) -> RetentionOptions:
    """How the model in `output`/NAME/checkpoint is measured."""
    # the shared expert counts where sizes are named
    keep = {f: str(round(f * size.experts) + size.num_shared) for f in size.fractions}
    is_small = model.name == "small"
    return RetentionOptions(
        checkpoint=output / model.name / "checkpoint",
        data=corpus.path / "calibration",
        held_out=corpus.path / "validation",
        output=output / model.name / "retention",
        keep=() if is_small else tuple(keep.values()),
        cross=() if is_small else (keep[CROSS],),
        tokens=size.calibration_tokens,
        held_out_tokens=size.evaluation_tokens,
        rows=size.rows_at_once,
        megatron=shlex.join(size.flags),
        seed=model.seed,
        name=model.name,
    )


def _rows(model: Model, size: Size, *, corpus: Corpus, output: Path) -> list[retention.RetentionRow]:
    """The model's evaluation as rows of the report."""
    options = retention_options(model, size, corpus=corpus, output=output)
    return retention.rows_of(read_rows(options.rows_file), model=model.name, seed=model.seed, versions=versions())


def _report(rows: list[retention.RetentionRow], *, output: Path, corpus: Corpus, size: Size) -> None:
    retention.save_rows(rows, output / "retention")
    caption = (
        f"{size.experts} routed experts + 1 shared, top-{size.top_k}, {size.layers} layers, "
        f"{size.tokens / 1e6:.1f}M tokens of {len(corpus.domains)} domains; {versions()}"
    )
    retention.plot_retention(rows, output / "retention.png", caption=caption)
    print(retention.table(rows))
    for finding in retention.findings(rows) if size == FULL else []:
        print(f"  {'yes' if finding.holds else 'NO '}  {finding.text}")
    print(f"\nrows: {output}/retention.csv and .json; figure: {output}/retention.png", flush=True)
