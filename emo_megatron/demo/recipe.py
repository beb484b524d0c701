"""The demo's models: one set of Megatron flags, and what differs between the models compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from emo_megatron.config import PoolDocuments
from emo_megatron.mcore.cpu import local_flags


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models are and how long they train."""

    steps: int = 800
    """Optimizer steps."""
    rows: int = 16
    """Packed samples a step: the population of the balance loss."""
    micro_rows: int | None = None
    """Of them, those of a micro-batch; None: all. With several micro-batches the balance runs over those so far."""
    seq_length: int = 256
    """Tokens a sample."""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 32
    """Routed experts; one shared expert comes on top."""
    expert_hidden: int = 64
    shared_hidden: int = 64
    """Width of the shared expert."""
    top_k: int = 2
    pool_min: int = 6
    pool_decay: float = 0.6
    """Share of training over which the pool's lower bound falls from all experts to pool_min."""
    fractions: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    """Fractions of the routed experts that modules keep."""
    evaluation_tokens: int = 16384
    """Validation tokens a domain."""
    calibration_tokens: int = 8192
    """Calibration tokens a domain, which choose its experts."""
    lr: float = 3e-3
    """Largest learning rate; it falls to a tenth."""
    warmup: int = 40
    """Steps in which the learning rate rises, a quarter of all at most."""
    positions: str = "rope"
    """Megatron's --position-embedding-type."""
    documents: PoolDocuments = "attention"
    """Who gets document boundaries, in every model alike."""
    flags: tuple[str, ...] = ()
    """More of Megatron's flags, for training and evaluation alike."""

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch."""
        return self.micro_rows or self.rows

    @property
    def num_shared(self) -> int:
        """Shared experts as --keep counts them: how many routed ones are as wide."""
        return -(-self.shared_hidden // self.expert_hidden)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.steps * self.rows * self.seq_length


FULL = Size()
"""What the README's figure shows."""
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
ON_GPU = Size(
    steps=915,
    rows=128,
    micro_rows=64,
    seq_length=1024,
    layers=8,
    hidden=512,
    heads=8,
    experts=64,
    expert_hidden=256,
    shared_hidden=512,
    top_k=4,
    pool_min=12,
    fractions=(0.5, 0.25, 0.125),
    evaluation_tokens=65536,
    calibration_tokens=32768,
    lr=1.5e-3,
    warmup=80,
    # without Transformer Engine Megatron turns packed documents one by one, which a GPU would wait for
    positions="learned_absolute",
    flags=("--bf16", *local_flags()),
)
"""120 million tokens for a GPU without Transformer Engine: benchmarks/fidelity.py."""
ON_GPU_QUICK = replace(
    QUICK, steps=24, micro_rows=4, shared_hidden=64, warmup=4, positions=ON_GPU.positions, flags=ON_GPU.flags
)
"""All that `ON_GPU` does, in seconds on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to pretrain: a name, and its flags on top of the common ones."""

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
    """A second seed of the two models compared, and two ablations of EMO that lose the modules."""
    emo = (*_experts(size.experts), *_pools(size))
    return [
        Model(name="emo-seed2", flags=emo, seed=seed + 1),
        Model(name="standard-seed2", flags=_experts(size.experts), seed=seed + 1),
        Model(
            name="emo-ignores-boundaries",
            flags=(*_experts(size.experts), *_long_samples(size, 4), "--pool-scope", "sample"),
            seed=seed,
        ),
        # a micro-batch of one sample: the load balances within it, as without global balancing
        Model(name="emo-balances-locally", flags=(*emo, "--micro-batch-size", "1"), seed=seed),
    ]


def _experts(number: int) -> tuple[str, ...]:
    return ("--num-experts", str(number))


def _pools(size: Size, *, rows: int | None = None) -> tuple[str, ...]:
    # the lower bound of the pool starts at all experts: more than half of the gap to the standard model closes
    decay = round(size.pool_decay * size.steps * (rows or size.rows))
    flags = ("--pool-min", str(size.pool_min), "--pool-min-decay-samples", str(decay))
    # as Megatron balances the standard model, so that both see one population
    return flags if size.micro_rows is None else (*flags, "--pool-balance", "running")


def _long_samples(size: Size, times: int) -> tuple[str, ...]:
    """EMO on as many tokens a step in samples so much longer, each of which packs several documents."""
    rows, length = str(size.rows // times), str(size.seq_length * times)
    return (
        *_pools(size, rows=size.rows // times),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", rows, "--global-batch-size", rows),
    )


def megatron_flags(size: Size, model: Model, *, tokenizer: Path, data_prefix: Path, run_dir: Path) -> list[str]:
    """Flags of examples/pretrain_emo.py for one model; the evaluation takes the same.

    The model's own flags come last, so that they win.
    """
    flags: dict[str, object] = {
        "--num-layers": size.layers,
        "--hidden-size": size.hidden,
        "--ffn-hidden-size": size.expert_hidden,
        "--num-attention-heads": size.heads,
        "--seq-length": size.seq_length,
        "--max-position-embeddings": size.seq_length,
        "--position-embedding-type": size.positions,
        "--normalization": "RMSNorm",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--moe-ffn-hidden-size": size.expert_hidden,
        "--moe-shared-expert-intermediate-size": size.shared_hidden,
        "--moe-router-topk": size.top_k,
        "--moe-router-dtype": "fp32",
        "--moe-router-load-balancing-type": "global_aux_loss",
        "--moe-aux-loss-coeff": 0.1 / size.layers,
        "--moe-z-loss-coeff": 1e-3 / size.layers,
        "--moe-token-dispatcher-type": "alltoall",
        "--micro-batch-size": size.rows_at_once,
        "--global-batch-size": size.rows,
        "--train-iters": size.steps,
        "--lr": size.lr,
        "--min-lr": size.lr / 10,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": min(size.warmup, size.steps // 4),
        "--weight-decay": 0.1,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--init-method-std": 0.02,
        "--seed": model.seed,
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": tokenizer,
        "--data-path": data_prefix,
        "--data-cache-path": run_dir / "data-cache",
        "--split": "100,0,0",
        "--num-workers": 0,
        "--eval-iters": 0,
        "--eval-interval": 1_000_000,
        "--log-interval": max(1, size.steps // 140),
        "--save": run_dir / "checkpoint",
        "--load": run_dir / "checkpoint",
        "--save-interval": max(1, size.steps // 4),
        "--ckpt-format": "torch_dist",
    }
    switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    if size.documents == "routers":
        switches += ["--pool-documents", "routers"]
    else:
        switches += ["--dataloader-inter-document-masking"]
    values = [str(item) for pair in flags.items() for item in pair]
    return [*values, *switches, *size.flags, *model.flags]
