"""The demo: pretrain EMO and a standard MoE through Megatron on real text, cut modules out, show what they keep.

Every step leaves files in the output folder and is skipped when they are there, so an interrupted demo goes on where
it was.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path

from emo_megatron import __version__
from emo_megatron.demo import corpus as corpora
from emo_megatron.demo.jobs import Job, last_iteration, run_chains, torchrun
from emo_megatron.demo.recipe import (
    FULL,
    QUICK,
    Model,
    Size,
    extra_models,
    main_models,
    megatron_flags,
)
from emo_megatron.report import retention

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "examples" / "pretrain_emo.py"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Pretrain three small models on text this machine already has and show what a quarter of their experts keeps."""

    output: Path = Path("runs/demo")
    """Folder of the run; an interrupted run in it is continued."""
    corpus: Path | None = None
    """Folder with one folder of text files a domain. Default: text found on this machine."""
    quick: bool = False
    """A run of about two minutes that shows the mechanics; its models are too small to show the effect."""
    extra: bool = False
    """Also train a second seed and two ablations (about three times as long)."""
    seed: int = 1234
    """Of initialisation, data order and pool sizes."""
    processes: int = field(default=2)
    """Processes side by side, one thread each."""


def run_demo(config: DemoConfig) -> Path:
    """Run or continue the demo and print its table.

    Returns:
        The output folder, with retention.csv, retention.json and retention.png in it.

    Raises:
        ValueError: the corpus is too small, or the folder holds a run with other settings.
        FileNotFoundError: the package is not in a checkout of its repository.
    """
    if not PRETRAIN.exists():
        raise FileNotFoundError(
            f"the demo trains through {PRETRAIN}, which is part of the repository: run it from a checkout"
        )
    size = QUICK if config.quick else FULL
    output = config.output.resolve()
    _claim(output, config, size)
    corpus = corpora.prepare_corpus(output / "corpus", _corpus_config(config))
    print(corpora.describe(corpus), flush=True)
    models = main_models(size, seed=config.seed)
    if config.extra:
        models += extra_models(size, seed=config.seed)
    print(
        f"training {len(models)} models on {size.tokens / 1e6:.1f}M tokens each, "
        f"{config.processes} side by side; logs are in {output}/<model>/",
        flush=True,
    )
    chains = [
        [
            _training(model, size, corpus=corpus, output=output),
            _evaluation(model, size, corpus=corpus, output=output),
        ]
        for model in models
    ]
    run_chains(chains, at_once=config.processes, root=ROOT)
    rows = [row for model in models for row in _rows(model, output=output)]
    _report(rows, output=output, corpus=corpus, size=size)
    return output


def _claim(output: Path, config: DemoConfig, size: Size) -> None:
    """Refuse a folder that holds a run with other settings; note ours in a new one."""
    settings = {
        "size": dataclasses.asdict(size),
        "seed": config.seed,
        "corpus": str(config.corpus) if config.corpus else None,
    }
    settings = json.loads(json.dumps(settings))
    path = output / "demo.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != settings:
            raise ValueError(
                f"{output} holds a run with other settings: {_difference(found, settings)}. "
                "Give another folder with --output, or delete that one."
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=1))
    temporary.replace(path)


def _difference(found: dict[str, object], wanted: dict[str, object]) -> str:
    names = [key for key in wanted if found.get(key) != wanted[key]]
    return "; ".join(f"{name} is {found.get(name)} there and {wanted[name]} here" for name in names)


def _corpus_config(config: DemoConfig) -> corpora.CorpusConfig:
    full = corpora.CorpusConfig(corpus_dir=config.corpus, seed=config.seed)
    if not config.quick:
        return full
    return dataclasses.replace(full, max_domains=4, bytes_per_domain=300_000, min_documents=60)


def _training(model: Model, size: Size, *, corpus: corpora.Corpus, output: Path) -> Job:
    run_dir = output / model.name
    log = run_dir / "train.log"
    flags = megatron_flags(
        size,
        model,
        tokenizer=corpus.tokenizer_dir,
        data_prefix=corpus.train_prefix,
        run_dir=run_dir,
    )
    tracker = run_dir / "checkpoint" / "latest_checkpointed_iteration.txt"
    return Job(
        title=f"pretraining {model.name}",
        command=torchrun(str(PRETRAIN), *flags),
        log=log,
        total=size.steps,
        done=lambda: last_iteration(log),
        is_finished=lambda: tracker.exists() and tracker.read_text().strip() == str(size.steps),
    )


def _evaluation(model: Model, size: Size, *, corpus: corpora.Corpus, output: Path) -> Job:
    run_dir = output / model.name
    rows = run_dir / "rows.json"
    flags = megatron_flags(
        size,
        model,
        tokenizer=corpus.tokenizer_dir,
        data_prefix=corpus.train_prefix,
        run_dir=run_dir,
    )
    own = ["--evaluate-corpus", str(corpus.path), "--evaluate-output", str(rows)]
    own += ["--evaluate-tokens", str(size.evaluation_tokens)]
    own += ["--evaluate-calibration-tokens", str(size.calibration_tokens)]
    # the small model is compared whole: it is what a quarter of the experts competes with
    fractions = () if model.name == "small" else size.fractions
    own += ["--evaluate-fractions", *map(str, fractions)]
    domains = len(corpus.domains)
    total = domains * (1 + 2 * len(fractions)) + (
        domains * (domains - 1) if 0.25 in fractions else 0
    )
    return Job(
        title=f"evaluating {model.name}",
        command=torchrun("-m", "emo_megatron.mcore.evaluate", *flags, *own),
        log=run_dir / "evaluate.log",
        total=total,
        done=lambda: len(_read_rows(rows)),
        is_finished=lambda: len(_read_rows(rows)) == total,
    )


def _read_rows(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text()) if path.exists() else {}


def _rows(model: Model, *, output: Path) -> list[retention.RetentionRow]:
    """The model's evaluation as rows of the report."""
    found = _read_rows(output / model.name / "rows.json")
    rows = []
    for key, value in found.items():
        domain, evaluated_on, fraction, method = key.split("|")
        full = found[f"{evaluated_on}|{evaluated_on}|1|full"]["loss"]
        rows.append(
            retention.RetentionRow(
                model=model.name,
                domain=domain,
                evaluated_on=evaluated_on,
                keep_fraction=float(fraction),
                num_experts_kept=int(value["num_experts_kept"]),
                method=method,
                loss=value["loss"],
                rise=value["loss"] - full,
                tokens=int(value["tokens"]),
                seed=model.seed,
                versions=_versions(),
            )
        )
    return rows


def _versions() -> str:
    names = ("torch", "megatron-core")
    return ", ".join(
        [f"emo_megatron {__version__}", *(f"{n} {importlib.metadata.version(n)}" for n in names)]
    )


def _report(
    rows: list[retention.RetentionRow], *, output: Path, corpus: corpora.Corpus, size: Size
) -> None:
    retention.save_rows(rows, output / "retention")
    caption = (
        f"{size.experts} routed experts + 1 shared, top-{size.top_k}, {size.layers} layers, "
        f"{size.tokens / 1e6:.1f}M tokens of {len(corpus.domains)} domains; {_versions()}"
    )
    retention.plot_retention(rows, output / "retention.png", caption=caption)
    print(retention.table(rows))
    for finding in retention.findings(rows) if size == FULL else []:
        print(f"  {'yes' if finding.holds else 'NO '}  {finding.text}")
    print(f"\nrows: {output}/retention.csv and .json; figure: {output}/retention.png", flush=True)
