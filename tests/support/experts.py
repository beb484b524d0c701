"""Made-up statistics and a made-up runner, for tests of what uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emo_megatron.commands.options import ModelOptions
from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.stats import ExpertStatistics, ModelMetadata
from emo_megatron.runners.base import Loss, Setting
from emo_megatron.runners.cache import CachedRunner, NoCache, open_cache

METADATA = ModelMetadata(
    fingerprint="f00d", num_experts=8, top_k=2, layers=(2, 3, 4), expert_parameters=1000, other_parameters=50_000
)

SETTING = Setting(weights="w", seq_length=16, dtype="torch.float32")


def documents(count: int, *, name: str = "some") -> Documents:
    tokens = tuple(torch.arange(1, 3 + at) for at in range(count))
    return Documents(tokens=tokens, source={"file": name, "sha256": name * 4, "documents": count})


class MadeUpModel:
    """Expert e's share of a document's tokens grows with e and differs by layer and document.

    `loss` gives the nats of so many experts kept in the first layer; `fails_at` and `loss_fails_at` are the calls of
    `statistics` and `loss`, from 0, that are interrupted.
    """

    is_writer = True

    def __init__(
        self,
        loss: Callable[[int], float] = lambda kept: 1.0,
        *,
        metadata: ModelMetadata = METADATA,
        fails_at: int | None = None,
        loss_fails_at: int | None = None,
        setting: Setting = SETTING,
    ) -> None:
        self.setting = setting
        self.metadata, self._loss, self._fails_at = metadata, loss, fails_at
        self._loss_fails_at = loss_fails_at
        self.seen: list[tuple[int, list[list[bool]] | None]] = []
        self.num_losses = 0

    def from_writer(self, read: Callable[[], Any]) -> Any:
        return read()

    def statistics(
        self, documents: Sequence[Tensor], *, outputs: bool, allowed_LE: Tensor | None = None
    ) -> ExpertStatistics:
        if len(self.seen) == self._fails_at:
            raise KeyboardInterrupt
        self.seen.append((len(documents), None if allowed_LE is None else allowed_LE.tolist()))
        num_layers, num_experts = len(self.metadata.layers), self.metadata.num_experts
        tokens = sum(document.numel() for document in documents)
        rank_LE = (torch.arange(num_experts) + 3 * torch.arange(num_layers)[:, None]) % num_experts
        weight_LE = rank_LE.double() + 1
        if allowed_LE is not None:
            # what earlier layers have left changes what later ones see
            gone_L = (~allowed_LE).sum(-1).cumsum(0) - (~allowed_LE).sum(-1)
            weight_LE = (weight_LE + gone_L[:, None]) % (num_experts + 1)
        count_LE = weight_LE.long() * tokens
        return ExpertStatistics(
            model=self.metadata,
            num_documents=len(documents),
            num_tokens=tokens,
            probability_LE=weight_LE * tokens,
            count_LE=count_LE,
            coactivation_LEE=torch.diag_embed(count_LE),
            gated_norm_LE=(num_experts - weight_LE) * tokens if outputs else None,
            residual_change_LE=1.0 / (1 + weight_LE) * tokens if outputs else None,
        )

    def loss(self, documents: Sequence[Tensor], *, allowed_LE: Tensor | None = None) -> Loss:
        if self.num_losses == self._loss_fails_at:
            raise KeyboardInterrupt
        self.num_losses += 1
        kept = self.metadata.num_experts if allowed_LE is None else int(allowed_LE[0].sum())
        return Loss(nats=self._loss(kept), num_tokens=10)


def open_as(monkeypatch: pytest.MonkeyPatch, model: Any, *, read: Callable[..., Documents] | None = None) -> None:
    """Let the commands that run a model find this one in every checkpoint, in this process.

    `read` gives the documents of a path; by default three with the path's name.
    """

    def named(path: Path, calibration: Any) -> Documents:
        return documents(3, name=path.stem)

    def found(options: ModelOptions, checkpoint: Path, *, texts: Sequence[Path]) -> tuple[CachedRunner, Any]:
        return CachedRunner(model, NoCache() if options.no_cache else open_cache()), read or named

    monkeypatch.setattr(ModelOptions, "open", found)
    monkeypatch.setattr(ModelOptions, "runs_in_ranks", lambda *_: False)


class OtherRank(MadeUpModel):
    """On a rank that writes nothing and whose own files are not looked at: it is told what the writer found."""

    is_writer = False

    def __init__(self, *told: Any, **options: Any) -> None:
        super().__init__(**options)
        self._told = list(told)

    def from_writer(self, read: Callable[[], Any]) -> Any:
        return self._told.pop(0)


def statistics(count: int = 3, *, outputs: bool = True, **changes: Any) -> ExpertStatistics:
    source = documents(count, name=changes.pop("name", "some"))
    stats = MadeUpModel().statistics(source.tokens, outputs=outputs)
    return dataclasses.replace(stats.of(source.source), **changes)
