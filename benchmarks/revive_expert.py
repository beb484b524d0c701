"""How many steps does an expert with a dead router row stay unused, if only the expert bias balances load?

    .venv/bin/python benchmarks/revive_expert.py

Trains a small Megatron GPT with sigmoid routers on the bytes of Python's standard library and its help texts. After
the warm-up, the most used expert of every layer gets bias 0 and a new router row: the least-squares fit to a logit of
-6 for all tokens. No token chooses this expert then, and a row that no token uses gets no gradient. The benchmark
counts the steps until the expert again has half of an even share of choices: in the standard MoE, with pools by
probability and with pools by gate_with_bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from experts import GroupedExperts
from layers import start_megatron
from library_text import VOCAB, library_texts, packed_batches
from timing import RESULTS, Ended, describe_machine, markdown_table, run_script, write_results
from watched_router import HALF_SHARE, RECENT, Watched

from emo_megatron.config import PoolConfig

STANDARD = "standard MoE"
POOLS: dict[str, Any] = {"pools by probability": "probability", "pools by gate_with_bias": "gate_with_bias"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make the router row of an expert lose every choice, and count steps until the expert is used again."""

    update_rate: float = 2e-3
    """Megatron's --moe-router-bias-update-rate. Its default, 1e-3, is half as fast and needs twice the steps."""
    seeds: tuple[int, ...] = (1, 2)
    warmup: int = 200
    """Steps before the router row is replaced."""
    cap: int = 500
    """Largest number of steps to wait."""
    layers: int = 2
    experts: int = 32
    top_k: int = 4
    pool_min: int = 8
    pool_max: int = 12
    model_dim: int = 64
    ffn_dim: int = 32
    rows: int = 4
    """Packed samples per step, with two documents each."""
    seq_length: int = 256
    lr: float = 3e-3
    """Learning rate of the warm-up."""
    lr_after: float = 0.0
    """Learning rate after the warm-up. 0: only the bias can bring the expert back. Above 0, hidden states drift from
    the states that the row was fit to, and the rows of other experts change too."""
    output: Path = RESULTS
    """Folder of the page and the CSV."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.pool_min <= self.pool_max < self.experts:
            raise ValueError(
                "--top-k, --pool-min, --pool-max and --experts must rise, pools being smaller than all experts; got "
                f"{self.top_k}, {self.pool_min}, {self.pool_max}, {self.experts}"
            )
        for name in ("warmup", "cap", "layers", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}")
        if self.seq_length < 4:
            raise ValueError(f"--seq-length must be at least 4; got {self.seq_length}")

    @property
    def even_share(self) -> float:
        """Choices of an expert in a step that are its share if all have the same."""
        return self.rows * self.seq_length * self.top_k / self.experts


def main(options: Options) -> list[Path]:
    """Train every contender with every seed.

    Returns:
        The CSV and the page.
    """
    metadata = describe_machine(torch.device("cpu"), threads=torch.get_num_threads())
    start_megatron(torch.device("cpu"))
    texts = library_texts(shortest=options.seq_length)
    rows: list[dict[str, Any]] = []
    runs = [(name, seed) for seed in options.seeds for name in (STANDARD, *POOLS)]
    try:
        for name, seed in runs:
            rows += _revive(name, seed, texts, options)
            print(*rows[-options.layers :], sep="\n", flush=True)
    except Ended:
        if not rows:
            raise
        metadata["ended"] = f"after {len(rows) // options.layers} of {len(runs)} runs"
    page = _page(rows, options, metadata)
    name = f"revive-expert-{'trained' if options.lr_after else 'frozen'}"
    return write_results(options.output, name, rows=rows, page=page)


def _revive(name: str, seed: int, texts: Sequence[bytes], options: Options) -> list[dict[str, Any]]:
    """One contender with one seed: a row for every layer."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors

    from emo_megatron.mcore.context import CLOCK
    from emo_megatron.mcore.router import PoolRouter

    torch.manual_seed(seed)
    model = _model(name, options)
    watched = [Watched(m) for m in model.modules() if isinstance(m, PoolRouter)]
    # without decay a row that gets no gradient stays as it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    step = done = 0
    batches = packed_batches(texts, rows=options.rows, seq_length=options.seq_length, seed=seed)
    for step, batch in enumerate(batches):
        CLOCK.consumed_samples = step * options.rows
        losses_1T = model(**batch.tokens, attention_mask=None, packed_seq_params=batch.packed())
        losses_1T.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        _update_router_expert_bias([model], model.config)
        reset_model_temporary_tensors(model.config, [model])
        if step + 1 == options.warmup:
            for layer in watched:
                layer.kill(optimizer)
            optimizer.param_groups[0]["lr"] = options.lr_after
        done = step + 1 - options.warmup
        if done > 0:
            for layer in watched:
                layer.note(done, even_share=options.even_share)
            if done == options.cap or all(HALF_SHARE in layer.first for layer in watched):
                break
    run = {"router": name, "seed": seed, "update_rate": options.update_rate, "steps": done}
    return [run | layer.row() | {"loss": round(float(losses_1T.detach().mean()), 3)} for layer in watched]


def _model(name: str, options: Options) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from emo_megatron.mcore.layer import PoolMoELayer
    from emo_megatron.mcore.spec import pool_block_spec

    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.model_dim,
        ffn_hidden_size=options.ffn_dim,
        num_attention_heads=4,
        num_moe_experts=options.experts,
        moe_router_topk=options.top_k,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=options.update_rate,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_ffn_hidden_size=options.ffn_dim,
        moe_shared_expert_intermediate_size=options.ffn_dim,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_impl="local",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    pool = PoolConfig()
    if name != STANDARD:
        pool = PoolConfig(pool_min=options.pool_min, pool_max=options.pool_max, pool_score=POOLS[name])
    model = GPTModel(
        config=config,
        transformer_layer_spec=pool_block_spec(config, pool=pool),
        vocab_size=VOCAB,
        max_sequence_length=options.seq_length,
        position_embedding_type="learned_absolute",
    )
    for layer in [m for m in model.modules() if isinstance(m, PoolMoELayer)]:
        layer.experts = GroupedExperts(layer.experts)
    return model.train()


def _page(rows: Sequence[dict[str, Any]], options: Options, metadata: dict[str, str]) -> str:
    described = ", ".join(
        f"{f.name} {getattr(options, f.name)}" for f in dataclasses.fields(options) if f.name != "output"
    )
    hidden = {"update_rate", "expert", "bias at death", "loss"}
    head = [name for name in rows[0] if name not in hidden]
    table = [[str(row[name]) if row[name] != "" else "-" for name in head] for row in rows]
    return "\n".join(
        [
            "# A dead expert\n",
            "\n".join(f"- {name}: {value}" for name, value in metadata.items()) + "\n",
            f"{described}. Sigmoid gates, expert bias, no balance loss. `in a pool`, `first token` and `{HALF_SHARE}` "
            "count steps from the death of the row; - is never, or no pools. The gate is the dead expert's mean over "
            f"tokens. Half its share, and experts in no pool: over the last {RECENT} steps.\n",
            markdown_table(head, table),
        ]
    )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))))
