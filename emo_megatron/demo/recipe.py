"""The demo's models: one set of Megatron flags, and what differs between the models compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the demo is. The full size is what the README's figure shows."""

    steps: int = 800
    """Optimizer steps."""
    rows: int = 16
    """Packed samples a step, all in one micro-batch: the population of the balance loss."""
    seq_length: int = 256
    """Tokens a sample."""
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    experts: int = 32
    """Routed experts; one shared expert comes on top."""
    expert_hidden: int = 64
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

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.steps * self.rows * self.seq_length


FULL = Size()
QUICK = Size(
    steps=16,
    rows=8,
    seq_length=128,
    layers=2,
    hidden=64,
    experts=8,
    expert_hidden=32,
    pool_min=2,
    fractions=(0.5, 0.25),
    evaluation_tokens=2048,
    calibration_tokens=2048,
)


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
    return ("--pool-min", str(size.pool_min), "--pool-min-decay-samples", str(decay))


def _long_samples(size: Size, times: int) -> tuple[str, ...]:
    """EMO on as many tokens a step in samples so much longer, each of which packs several documents."""
    rows, length = str(size.rows // times), str(size.seq_length * times)
    return (
        *_pools(size, rows=size.rows // times),
        *("--seq-length", length, "--max-position-embeddings", length),
        *("--micro-batch-size", rows, "--global-batch-size", rows),
    )


def megatron_flags(
    size: Size, model: Model, *, tokenizer: Path, data_prefix: Path, run_dir: Path
) -> list[str]:
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
        "--position-embedding-type": "rope",
        "--normalization": "RMSNorm",
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--moe-ffn-hidden-size": size.expert_hidden,
        "--moe-shared-expert-intermediate-size": size.expert_hidden,
        "--moe-router-topk": size.top_k,
        "--moe-router-dtype": "fp32",
        "--moe-router-load-balancing-type": "global_aux_loss",
        "--moe-aux-loss-coeff": 0.1 / size.layers,
        "--moe-z-loss-coeff": 1e-3 / size.layers,
        "--moe-token-dispatcher-type": "alltoall",
        "--micro-batch-size": size.rows,
        "--global-batch-size": size.rows,
        "--train-iters": size.steps,
        "--lr": 3e-3,
        "--min-lr": 3e-4,
        "--lr-decay-style": "cosine",
        "--lr-warmup-iters": min(40, size.steps // 4),
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
    switches = [
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--dataloader-inter-document-masking",
    ]
    return [str(item) for pair in flags.items() for item in pair] + switches + list(model.flags)
