"""The demo's models: Megatron flags that all models share, and the flags that differ between models.

As a command, this module reads the options of demo.sh, prints variables for demo.sh, and writes the flags of every run.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from emo_megatron.config import PoolDocuments
from emo_megatron.files import message_of, whole
from emo_megatron.json_files import read_object
from emo_megatron.processes import stops_on_signals
from emo_megatron.runners.launch import USER_ERROR, say_error
from emo_megatron.variables import PARENT, process_environment, stay_offline

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "examples" / "pretrain_emo.py"
MEASURE = ROOT / "demo" / "measure.py"
CROSS = 0.25
"""Fraction of the experts whose modules are also evaluated on every other domain."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the models and length of training."""

    steps: int = 800
    """Optimizer steps."""
    rows: int = 16
    """Packed samples per step; the balance loss is computed over these samples."""
    micro_rows: int | None = None
    """Packed samples per micro-batch; None: all. With several, balance is over the step's micro-batches so far."""
    seq_length: int = 256
    """Tokens per sample."""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 64
    """Routed experts, without the one shared expert."""
    expert_hidden: int = 32
    shared_hidden: int = 128
    """Width of the shared expert."""
    top_k: int = 2
    pool_min: int = 16
    pool_decay: float = 0.0
    """Share of training over which the pool's lower bound falls from all experts to pool_min; 0: always pool_min."""
    pool_delay: float = 0.25
    """Share of training before pools start."""
    pool_skew: float = 1.0
    """Skew of the drawn pool sizes, see --pool-skew."""
    unrestricted: float = 0.0
    """Share of documents that may use all experts."""
    balance: float = 0.1
    """Coefficient of the balance loss, as the sum over the layers."""
    fractions: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    """Fractions of the routed experts that modules keep."""
    evaluation_tokens: int = 16384
    """Validation tokens per domain."""
    calibration_tokens: int = 8192
    """Calibration tokens per domain, by which the domain's experts are chosen."""
    lr: float = 3e-3
    """Largest learning rate; the learning rate decays to a tenth of this value."""
    warmup: int = 40
    """Warm-up steps of the learning rate; at most a quarter of all steps are used."""
    positions: str = "rope"
    """Megatron's --position-embedding-type."""
    documents: PoolDocuments = "attention"
    """Which parts of every model get document boundaries, see --pool-documents."""
    flags: tuple[str, ...] = ()
    """More flags of Megatron, for training and evaluation."""

    @property
    def micro_batch_size(self) -> int:
        """Packed samples per micro-batch."""
        return self.micro_rows or self.rows

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.steps * self.rows * self.seq_length


FULL = Size()
"""The size of the models in the README's figure."""
QUICK = Size(
    steps=16,
    rows=8,
    seq_length=128,
    layers=2,
    hidden=64,
    experts=8,
    expert_hidden=32,
    shared_hidden=32,
    pool_min=2,
    fractions=(0.5, 0.25),
    evaluation_tokens=2048,
    calibration_tokens=2048,
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to pretrain: its name, and its flags in addition to the shared flags."""

    name: str
    flags: tuple[str, ...]
    seed: int


def main_models(size: Size, *, seed: int) -> list[Model]:
    """EMO, the matched standard MoE, and a standard MoE with a quarter of the experts."""
    return [
        Model(name="emo", flags=(*_experts(size.experts), *_pools(size)), seed=seed),
        Model(name="standard", flags=_experts(size.experts), seed=seed),
        Model(name="small", flags=_experts(size.experts // 4), seed=seed),
    ]


def extra_models(size: Size, *, seed: int) -> list[Model]:
    """A second seed of EMO and of the standard MoE, and two ablations that remove EMO's effect on modules."""
    emo = (*_experts(size.experts), *_pools(size))
    return [
        Model(name="emo-seed2", flags=emo, seed=seed + 1),
        Model(name="standard-seed2", flags=_experts(size.experts), seed=seed + 1),
        Model(
            name="emo-ignores-boundaries",
            flags=(*_experts(size.experts), *_long_samples(size, 4), "--pool-scope", "sample"),
            seed=seed,
        ),
        # with one sample per micro-batch, the load is balanced within each sample, as without global balancing
        Model(name="emo-balances-locally", flags=(*emo, "--micro-batch-size", "1"), seed=seed),
    ]


def _experts(number: int) -> tuple[str, ...]:
    return ("--num-experts", str(number))


def _pools(size: Size, *, rows: int | None = None) -> tuple[str, ...]:
    samples = size.steps * (rows or size.rows)
    schedule = {
        "--pool-min-decay-samples": round(size.pool_decay * samples),
        "--pool-delay-samples": round(size.pool_delay * samples),
        "--pool-skew": size.pool_skew,
        "--pool-unrestricted": size.unrestricted,
    }
    defaults = {"--pool-skew": 1}
    flags = ["--pool-min", str(size.pool_min)]
    flags += [item for name, value in schedule.items() if value != defaults.get(name, 0) for item in (name, str(value))]
    # Megatron balances the standard model over the same samples
    return (*flags, *(() if size.micro_rows is None else ("--pool-balance", "running")))


def _long_samples(size: Size, times: int) -> tuple[str, ...]:
    """Flags of EMO with samples that are `times` longer, each with several documents, and the same tokens per step."""
    rows, length = str(size.rows // times), str(size.seq_length * times)
    return (
        *_pools(size, rows=size.rows // times),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", rows, "--global-batch-size", rows),
    )


def megatron_flags(size: Size, model: Model, *, corpus: Path, run_dir: Path) -> list[str]:
    """Flags of examples/pretrain_emo.py for one model.

    The model's own flags come last, so that they override the shared flags.

    Args:
        size: size of the model and length of training.
        model: the model to train.
        corpus: folder of the corpus, see corpus.py.
        run_dir: folder of the run; the checkpoints are in its folder `checkpoint`, and an interrupted training resumes
            from them.
    """
    flags = f"""
        --num-layers {size.layers} --hidden-size {size.hidden} --ffn-hidden-size {size.expert_hidden}
        --num-attention-heads {size.heads}
        --seq-length {size.seq_length} --max-position-embeddings {size.seq_length}
        --position-embedding-type {size.positions} --normalization RMSNorm
        --attention-dropout 0 --hidden-dropout 0
        --moe-ffn-hidden-size {size.expert_hidden} --moe-shared-expert-intermediate-size {size.shared_hidden}
        --moe-router-topk {size.top_k} --moe-router-dtype fp32 --moe-router-load-balancing-type global_aux_loss
        --moe-aux-loss-coeff {size.balance / size.layers} --moe-z-loss-coeff {1e-3 / size.layers}
        --moe-token-dispatcher-type alltoall
        --micro-batch-size {size.micro_batch_size} --global-batch-size {size.rows} --train-iters {size.steps}
        --lr {size.lr} --min-lr {size.lr / 10} --lr-decay-style cosine
        --lr-warmup-iters {min(size.warmup, size.steps // 4)} --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
        --init-method-std 0.02 --seed {model.seed}
        --split 100,0,0 --num-workers 0 --eval-iters 0 --eval-interval 1000000
        --log-interval {max(1, size.steps // 140)} --save-interval {max(1, size.steps // 4)} --ckpt-format torch_dist
        --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
        --tokenizer-type HuggingFaceTokenizer
    """.split()
    # these values may contain spaces
    flags += ["--tokenizer-model", str(corpus / "tokenizer"), "--data-path", str(corpus / "train")]
    flags += ["--data-cache-path", str(run_dir / "data-cache")]
    flags += ["--save", str(run_dir / "checkpoint"), "--load", str(run_dir / "checkpoint")]
    if size.documents == "routers":
        flags += ["--pool-documents", "routers"]
    else:
        flags += ["--dataloader-inter-document-masking"]
    return [*flags, *size.flags, *model.flags]


def retention_flags(size: Size, model: Model, *, corpus: Path, run_dir: Path) -> list[str]:
    """Flags of measure.py, or of `retention`, for the model in `run_dir`/checkpoint."""
    keep = {f: f"{round(f * size.experts)} routed" for f in size.fractions}
    # the small model keeps all its experts: a quarter of EMO's experts is compared with the whole small model
    sizes = [] if model.name == "small" else list(keep.values())
    sizes += ["--cross-sizes", keep[CROSS]] if sizes else []
    flags: dict[str, object] = {
        "--checkpoint": run_dir / "checkpoint",
        "--data": corpus / "calibration",
        "--validation-data": corpus / "validation",
        "--output": run_dir / "losses",
        "--tokens": size.calibration_tokens,
        "--validation-tokens": size.evaluation_tokens,
        "--micro-batch-size": size.micro_batch_size,
        "--seed": model.seed,
        "--name": model.name,
    }
    # flag and value in one argument, because the value looks like a flag
    more = [f"--megatron-args={shlex.join(size.flags)}"] if size.flags else []
    return [*(str(item) for pair in flags.items() for item in pair), *more, "--keep", *sizes]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pretrain three small models on text of this machine and compare the loss of modules cut out of the models."""

    output: Path | None = None
    """Folder of the run. Default: runs/demo, or runs/demo-quick with --quick. An interrupted run resumes."""
    corpus: Path | None = None
    """Folder with one subfolder of text files per domain. Default: text found on this machine."""
    quick: bool = False
    """Run for about two minutes to show the mechanics; the models are too small to show the effect."""
    extra: bool = False
    """Also train a second seed and two ablations; the demo takes about three times as long."""
    pool_documents: PoolDocuments = "attention"
    """attention: attention and routers stop at document boundaries. routers: in every model, only the routers do."""
    seed: int = 1234
    """Seed of initialisation, data order and pool sizes."""
    processes: int = 2
    """Number of models trained or evaluated at the same time, with one thread each."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes must be at least 1; got {self.processes}")
        # Megatron's bounds; --extra also uses the next seed
        if not 1 <= self.seed < 2**31:
            raise ValueError(f"--seed must be in [1, 2^31); got {self.seed}")


def plan(options: Options) -> dict[str, str]:
    """Write the settings and flags of a run to its folder, and return the variables that demo.sh needs.

    Raises:
        ValueError: if the folder contains a run with other settings.
    """
    size = replace(QUICK if options.quick else FULL, documents=options.pool_documents)
    output = (options.output or Path("runs") / ("demo-quick" if options.quick else "demo")).resolve()
    source = str(options.corpus.resolve()) if options.corpus else None
    models = main_models(size, seed=options.seed)
    settings = {"kind": "demo", "size": asdict(size), "seed": options.seed, "corpus": source}
    claim(output, settings | {model.name: " ".join(model.flags) for model in models})
    models += extra_models(size, seed=options.seed) if options.extra else []
    for model in models:
        folder = output / model.name
        folder.mkdir(exist_ok=True)
        for name, flags_of in {"train": megatron_flags, "evaluate": retention_flags}.items():
            flags = flags_of(size, model, corpus=output / "corpus", run_dir=folder)
            with whole(folder / f"{name}.flags") as unfinished:
                unfinished.write_text("".join(f"{flag}\0" for flag in flags), encoding="utf-8")
    about = (
        f"training {len(models)} models on {size.tokens:,} tokens each, {options.processes} at the same time; "
        f"logs are in {output}/<model>/"
    )
    return {
        "output": str(output),
        "processes": str(options.processes),
        "steps": str(size.steps),
        "models": " ".join(model.name for model in models),
        "about": about,
    }


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Store settings of the run in this folder; raise ValueError if the folder's run has other settings."""
    settings = json.loads(json.dumps(settings))
    path = output / "demo.json"
    found = read_object(path, kind="the settings of a run") if path.exists() else {}
    differing = [f"{name} is {was} there and {now} here" for name, was, now in differences(found, settings)]
    if differing:
        raise ValueError(
            f"{output} contains a run with other settings: {'; '.join(differing)}. "
            "Pass another folder with --output, or delete this folder."
        )
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(found | settings, indent=1), encoding="utf-8")


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """Yield (name, value found, value wanted) for settings that differ and that both have, in the order of `wanted`."""
    for name in (name for name in wanted if name in found):
        if isinstance(wanted[name], dict) and isinstance(found[name], dict):
            yield from differences(found[name], wanted[name])
        elif found[name] != wanted[name]:
            yield name, found[name], wanted[name]


def run_step(step: Callable[[], None]) -> None:
    """Run a step of demo.sh: offline, without partial files after a failure, and with one line per error."""
    stay_offline()
    try:
        with stops_on_signals():
            step()
    except (ImportError, OSError, ValueError) as error:
        say_error(message_of(error))
        sys.exit(USER_ERROR)


def main() -> None:
    """Print shell code that sets the environment of every step and the variables of demo.sh."""
    options = tyro.cli(Options, prog="demo/demo.sh", config=(tyro.conf.FlagCreatePairsOff,))
    known = plan(options)
    environment = process_environment()
    # the parent of the steps is the shell, which sets this variable itself
    environment.pop(PARENT)
    for name in os.environ.keys() - environment.keys():
        print(f"unset {name}")
    for name, value in environment.items():
        if os.environ.get(name) != value:
            print(f"export {name}={shlex.quote(value)}")
    for name, value in known.items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    run_step(main)
