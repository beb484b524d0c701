"""Held-out loss of a checkpoint by domain, with all experts and with subsets of them.

    torchrun -m emo_megatron.mcore.evaluate --load CHECKPOINT \
        --evaluate-corpus CORPUS --evaluate-output rows.json

For every domain: the loss with all experts; with a fraction of them, chosen by mean router probability over the
domain's calibration documents or at random; and the domain's module on every other domain. No pools, as exported
models run. One process; rows are saved as they come and a second call computes what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emo_megatron.mcore.loading import checkpoint_in, load_model
from emo_megatron.mcore.sequences import packed_sequences
from emo_megatron.modules.files import whole
from emo_megatron.modules.select import num_kept, select_random, select_top


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One row to measure."""

    domain: str
    evaluated_on: str
    keep_fraction: float
    method: str

    @property
    def key(self) -> str:
        """Names the row in the output file."""
        return f"{self.domain}|{self.evaluated_on}|{self.keep_fraction:g}|{self.method}"


def conditions(
    domains: list[str], *, keep_fractions: list[float], cross_fraction: float
) -> list[Condition]:
    """Every row of the evaluation, full models first."""
    rows = [Condition(domain=d, evaluated_on=d, keep_fraction=1.0, method="full") for d in domains]
    for fraction in keep_fractions:
        for method in ("mean_prob", "random"):
            rows += [
                Condition(domain=d, evaluated_on=d, keep_fraction=fraction, method=method)
                for d in domains
            ]
    if cross_fraction in keep_fractions:
        rows += [
            Condition(domain=d, evaluated_on=o, keep_fraction=cross_fraction, method="mean_prob")
            for d in domains
            for o in domains
            if o != d
        ]
    return rows


class ModuleEvaluator:
    """Runs one model with subsets of its experts.

    Args:
        model: a GPTModel whose MoE layers hold PoolRouters, all of it in this process.
        corpus: folder with calibration/ and validation/, one safetensors file a domain.
    """

    def __init__(
        self, model: torch.nn.Module, *, corpus: Path, seq_length: int, batch_size: int, eod: int
    ) -> None:
        from emo_megatron.mcore.router import PoolRouter

        self.model = model.eval()
        self.routers = [m for m in model.modules() if isinstance(m, PoolRouter)]
        self.num_experts = int(self.routers[0].config.num_moe_experts)
        self.corpus, self.seq_length, self.batch_size, self.eod = (
            corpus,
            seq_length,
            batch_size,
            eod,
        )

    def mean_router_probability(self, domain: str, *, num_tokens: int) -> Tensor:
        """[L, E] float64: mean softmax over all experts on the domain's calibration tokens."""
        sums = [torch.zeros(self.num_experts, dtype=torch.float64) for _ in self.routers]

        def observer(total: Tensor) -> Any:
            return lambda logits_TE, ids_T: total.add_(logits_TE.double().softmax(-1).sum(0).cpu())

        for router, total in zip(self.routers, sums, strict=True):
            router.observe_logits = observer(total)
        self.loss("calibration", domain, num_tokens=num_tokens, allowed_LE=None)
        for router in self.routers:
            router.observe_logits = None
        scores_LE = torch.stack(sums)
        return scores_LE / scores_LE.sum(dim=-1, keepdim=True)

    @torch.no_grad()
    def loss(
        self, split: str, domain: str, *, num_tokens: int, allowed_LE: Tensor | None
    ) -> tuple[float, int]:
        """Mean loss in nats a token and the number of tokens, with the allowed experts (None: all)."""
        for layer, router in enumerate(self.routers):
            router.allowed_experts = (
                None if allowed_LE is None else allowed_LE[layer].to(router.weight.device)
            )
        total, count = 0.0, 0.0
        for batch in packed_sequences(
            self.corpus / split / f"{domain}.safetensors",
            num_tokens=num_tokens,
            seq_length=self.seq_length,
            batch_size=self.batch_size,
            eod_token=self.eod,
        ):
            losses = self.model(
                batch.tokens.cuda(),
                batch.position_ids.cuda(),
                None,
                labels=batch.labels.cuda(),
                packed_seq_params=batch.documents(),
            )
            mask = batch.loss_mask.to(losses.device)
            total += float((losses.float() * mask).sum())
            count += float(mask.sum())
        for router in self.routers:
            router.allowed_experts = None
        return total / count, int(count)


def evaluate(
    evaluator: ModuleEvaluator,
    rows: list[Condition],
    *,
    output: Path,
    num_tokens: int,
    calibration_tokens: int,
    seed: int,
) -> None:
    """Measure every row that `output` does not hold yet; the file is replaced whole after each.

    The file maps `Condition.key` to the condition's fields and "loss" (nats a token), "tokens" (a count),
    "num_experts_kept" (routed experts).
    """
    done: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    scores: dict[str, Tensor] = {}
    for row in tqdm([r for r in rows if r.key not in done], desc="evaluating", disable=None):
        keep = num_kept(row.keep_fraction, num_experts=evaluator.num_experts)
        allowed_LE = None
        if row.method == "mean_prob":
            if row.domain not in scores:
                scores[row.domain] = evaluator.mean_router_probability(
                    row.domain, num_tokens=calibration_tokens
                )
            allowed_LE = select_top(scores[row.domain], keep=keep)
        elif row.method == "random":
            allowed_LE = select_random(
                num_layers=len(evaluator.routers),
                num_experts=evaluator.num_experts,
                keep=keep,
                seed=seed,
            )
        loss, tokens = evaluator.loss(
            "validation", row.evaluated_on, num_tokens=num_tokens, allowed_LE=allowed_LE
        )
        measured = {"loss": loss, "tokens": tokens, "num_experts_kept": keep}
        done[row.key] = dataclasses.asdict(row) | measured
        with whole(output) as unfinished:
            unfinished.write_text(json.dumps(done, indent=1))


def add_evaluation_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Flags of this command, next to Megatron's and the pools'."""
    from emo_megatron.mcore.args import add_pool_args

    group = add_pool_args(parser).add_argument_group("evaluation of modules")
    group.add_argument(
        "--evaluate-corpus", type=Path, help="folder with calibration/ and validation/"
    )
    group.add_argument(
        "--evaluate-output", type=Path, help="JSON file of rows, continued if it exists"
    )
    group.add_argument(
        "--evaluate-fractions", type=float, nargs="*", default=[0.5, 0.25, 0.125, 0.0625]
    )
    group.add_argument(
        "--evaluate-cross", type=float, default=0.25, help="fraction of the cross-domain rows"
    )
    group.add_argument(
        "--evaluate-tokens", type=int, default=16384, help="validation tokens a domain"
    )
    group.add_argument("--evaluate-calibration-tokens", type=int, default=8192)
    return parser


def main() -> None:
    """Load a checkpoint and evaluate it."""
    loaded = load_model(checkpoint_in(sys.argv[1:]), add_args=add_evaluation_args, check=_check)
    args = loaded.args
    manifest = json.loads((args.evaluate_corpus / "corpus.json").read_text())
    evaluator = ModuleEvaluator(
        loaded.model,
        corpus=args.evaluate_corpus,
        seq_length=args.seq_length,
        batch_size=args.micro_batch_size,
        eod=manifest["eod_token"],
    )
    evaluate(
        evaluator,
        conditions(
            list(manifest["domains"]),
            keep_fractions=args.evaluate_fractions,
            cross_fraction=args.evaluate_cross,
        ),
        output=args.evaluate_output,
        num_tokens=args.evaluate_tokens,
        calibration_tokens=args.evaluate_calibration_tokens,
        seed=args.seed,
    )


def _check(args: argparse.Namespace) -> None:
    if args.world_size > 1:
        raise ValueError(
            f"evaluation runs in one process; got {args.world_size}. Use --nproc-per-node 1"
        )
    for fraction in args.evaluate_fractions:
        kept = num_kept(fraction, num_experts=args.num_experts)
        if kept < args.moe_router_topk:
            raise ValueError(
                f"--evaluate-fractions {fraction} keeps {kept} of {args.num_experts} experts, and a "
                f"token needs --moe-router-topk {args.moe_router_topk}; drop it"
            )


if __name__ == "__main__":
    main()
