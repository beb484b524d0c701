"""Train a LoRA adapter of Hugging Face peft for the experts of an exported module, on an indexed dataset.

    .venv/bin/python benchmarks/train_lora.py --folder exported/perl --data data/perl --output adapters/perl

The rows of a step are those of Megatron's --dataloader-inter-document-masking: the documents one after the other, cut
every --seq-length tokens; attention stays within a document. The learning rate rises and falls as Megatron's
--lr-decay-style linear. `python -m emo_megatron import --adapter` merges the adapter.

Shapes: B rows, S positions, N tokens of the dataset, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import find_demo  # noqa: F401
import torch
import tyro
from torch import Tensor

from demo.recipe import run_step
from emo_megatron.files import must_not_exist, whole

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
"""The stacked weights of a layer's routed experts in transformers 5."""
IGNORED = -100
"""Label of a token that predicts nothing."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train an adapter for the routed experts of an exported module."""

    folder: Path
    """Folder that `python -m emo_megatron export` wrote."""
    data: Path
    """Prefix of an indexed dataset."""
    output: Path
    """Folder for the adapter; must not exist."""
    steps: int = 60
    rows: int = 16
    """Rows per step."""
    seq_length: int = 256
    """Tokens per row."""
    lr: float = 1e-3
    """Falls linearly to a tenth."""
    warmup: int = 4
    """Steps over which the learning rate rises from 0."""
    rank: int = 8
    alpha: int = 16
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of a step."""

    tokens_BS: Tensor
    labels_BS: Tensor
    """The next token of the document; IGNORED for the last token of a document."""
    positions_BS: Tensor
    """Position in the document, or from the start of the row; transformers' attention stays within such a run."""


def batches(documents: Sequence[Tensor], *, rows: int, seq_length: int) -> Iterator[Batch]:
    """Steps for ever, of documents [n] int64 in the given order; documents are cut at the ends of rows.

    Raises:
        ValueError: the documents have fewer tokens than a step.
    """
    size = rows * seq_length
    tokens_N = torch.cat(list(documents))
    labels_N = torch.cat([torch.cat([document[1:], torch.tensor([IGNORED])]) for document in documents])
    offsets_N = torch.cat([torch.arange(len(document)) for document in documents])
    if len(tokens_N) < size:
        raise ValueError(f"--data must hold at least the {size} tokens of a step; got {len(tokens_N)}")
    while True:
        # what is left of the last step is left out
        for start in range(0, len(tokens_N) - size + 1, size):
            tokens_BS, labels_BS, offsets_BS = (
                flat[start : start + size].view(rows, seq_length) for flat in (tokens_N, labels_N, offsets_N)
            )
            # a document that began in the row before goes on from position 0
            in_row_S = torch.arange(seq_length)
            positions_BS = torch.minimum(offsets_BS, in_row_S.expand(rows, -1))
            yield Batch(tokens_BS=tokens_BS, labels_BS=labels_BS, positions_BS=positions_BS)


def loss_of(model: Any, batch: Batch) -> Tensor:
    """Mean loss in nats per predicted token; a scalar."""
    logits_BSV = model(input_ids=batch.tokens_BS, position_ids=batch.positions_BS, use_cache=False).logits
    # the model's own loss would shift the labels
    return torch.nn.functional.cross_entropy(
        logits_BSV.flatten(0, 1).float(), batch.labels_BS.flatten(), ignore_index=IGNORED
    )


def share_of_rate(step: int, *, steps: int, warmup: int) -> float:
    """Share of the learning rate in a step, counted from 0: Megatron's, so the first step of a warm-up has none."""
    if step < warmup:
        return step / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def main(options: Options) -> None:
    """Train the adapter, and save it with the configuration of the model, which has the fingerprint of the weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from emo_megatron.mcore.dataset import IndexedDocuments

    must_not_exist(options.output)
    torch.manual_seed(options.seed)
    base = AutoModelForCausalLM.from_pretrained(options.folder, local_files_only=True)
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, steps=options.steps, warmup=options.warmup)
    )
    print(f"{sum(p.numel() for p in trained)} of {sum(p.numel() for p in model.parameters())} weights are trained")
    steps = batches(IndexedDocuments(options.data), rows=options.rows, seq_length=options.seq_length)
    for number, batch in enumerate(itertools.islice(steps, options.steps), start=1):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {number} loss {loss.item():.6f}", flush=True)
    with whole(options.output, is_new=True) as unfinished:
        model.save_pretrained(unfinished)
        base.config.save_pretrained(unfinished)


if __name__ == "__main__":
    run_step(lambda: main(tyro.cli(Options)))
