"""Record the experts that the demo's models choose for every token of validation documents, for `replay_routing.py`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Run:
    """A model and whether its pools are on."""

    name: str
    model: str
    pools: bool


def record(run: Run, *, runs: Path, tokens: int, stem: Path) -> None:
    """Run a model on both halves; in a process of its own, since Megatron keeps its flags for the life of one.

    Args:
        run: the model.
        runs: folder of a finished demo.
        tokens: of each domain.
        stem: where the files go: `stem`.stats with the statistics of the first half, `stem`.routing with the experts
            [T, E] bool of every token of the other by the number of the layer, and the model's width.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), EMO_DEVICE="cpu")
    sys.argv = ["replay", "--load", str(runs.absolute() / run.model / "checkpoint")]
    from emo_megatron.runners.loading import checkpoint_in, load_model

    checkpoint = checkpoint_in(sys.argv[1:])
    stored = checkpoint.args
    sys.argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(stored.padded_vocab_size)]
    model, _ = load_model(checkpoint)
    from emo_megatron.checkpoint.reader import metadata_of
    from emo_megatron.mcore.layer import PoolMoELayer
    from emo_megatron.runners.megatron import MegatronRunner

    runner = MegatronRunner(model, metadata=metadata_of(checkpoint), seq_length=stored.seq_length, micro_batch_size=16)
    layers = [m for m in model.modules() if isinstance(m, PoolMoELayer)]
    if run.pools:
        _train_with_pools(model, layers, stored)
    fit, test = _halves(runs, tokens=tokens)
    runner.statistics(fit, outputs=False).of({"documents": "first half"}).save(stem.with_suffix(".stats"))
    recorders = [_Recorder(layer) for layer in layers]
    runner.loss(test)
    tensors = {str(recorder.layer.layer_number): torch.cat(recorder.seen) for recorder in recorders}
    width = torch.tensor(stored.hidden_size)
    save_file(tensors | {"width": width}, stem.with_suffix(".routing"))


def _train_with_pools(model: Any, layers: Sequence[Any], stored: Any) -> None:
    """Pools as they were drawn at the end of the run."""
    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.context import CLOCK

    fields = (f.name for f in dataclasses.fields(PoolConfig) if hasattr(stored, f.name))
    pool = PoolConfig(**{name: getattr(stored, name) for name in fields})
    CLOCK.consumed_samples = stored.train_iters * stored.global_batch_size
    for layer in layers:
        layer.pool_router.pool = pool
    model.train()


class _Recorder:
    """Keeps which experts a layer's router gives every token that is no padding."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.seen: list[Tensor] = []
        self._ids_T: Tensor | None = None
        layer.pool_router.observe_logits = self._scored
        layer.router.register_forward_hook(self._routed)

    def _scored(self, logits_TE: Tensor, ids_T: Tensor | None) -> None:
        self._ids_T = ids_T

    def _routed(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        routing_map_TE = output[1].bool()
        kept = slice(None) if self._ids_T is None else self._ids_T >= 0
        self.seen.append(routing_map_TE[kept].clone())


def _halves(runs: Path, *, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Documents of all domains, mixed; every other one of a domain in each half."""
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for path in sorted((runs / "corpus" / "validation").glob("*.safetensors")):
        stored = load_file(path)
        bounds = stored["cu_seqlens"].tolist()
        taken = 0
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop > start and taken < tokens:
                halves[number % 2].append(stored["tokens"][start:stop].long())
                taken += stop - start
    generator = torch.Generator().manual_seed(0)
    fit, test = ([half[i] for i in torch.randperm(len(half), generator=generator).tolist()] for half in halves)
    return fit, test
