"""The losses of one checkpoint, document by document, as measure.py writes them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from demo.intervals import Difference, Documents, mean_of, paired
from emo_megatron.json_files import read_json
from emo_megatron.report.rows import CHOSEN, FULL, QUARTER, RANDOM

KIND = "the losses of a checkpoint"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The losses of one checkpoint on one text.

    Attributes:
        tokens: predicted tokens per validation document.
        nats: (method, share of the routed experts kept) -> nats per document.
        increase_on_others: mean loss increase of the quarter modules on other domains; None if not measured.
    """

    tokens: Documents
    nats: Mapping[tuple[str, float], Documents]
    increase_on_others: float | None

    def loss(self, method: str = FULL, keep_fraction: float = 1.0) -> float:
        """Mean over domains, in nats per token."""
        nats = self.nats[method, keep_fraction]
        return fmean(math.fsum(nats[domain]) / sum(self.tokens[domain]) for domain in self.tokens)

    def increase(self, method: str, keep_fraction: float) -> Difference:
        """Mean loss increase over the model with all experts."""
        return minus(self, self, method=method, keep_fraction=keep_fraction)


def read_measured(path: Path) -> Measured:
    """The content of a measured.json."""
    return _read(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _read(path: Path, written: int) -> Measured:
    # the file is written again after every size: `written` keeps apart what it held
    rows: list[dict[str, Any]] = read_json(path, kind=KIND)
    own = [row for row in rows if row["method"] in (FULL, RANDOM) or row["domain"] == row["evaluated_on"]]
    nats: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in own:
        nats.setdefault((row["method"], row["keep_fraction"]), {})[row["evaluated_on"]] = row["nats"]
    full = {row["evaluated_on"]: row["loss"] for row in own if row["method"] == FULL}
    others = [row for row in rows if row["method"] == CHOSEN and row["domain"] != row["evaluated_on"]]
    rises = [row["loss"] - full[row["evaluated_on"]] for row in others if row["keep_fraction"] == QUARTER]
    return Measured(
        tokens={row["evaluated_on"]: row["document_tokens"] for row in own if row["method"] == FULL},
        nats=nats,
        increase_on_others=fmean(rises) if rises else None,
    )


def minus(first: Measured, second: Measured, *, method: str = FULL, keep_fraction: float = 1.0) -> Difference:
    """The loss of some experts of the first model minus the loss of the second model with all experts.

    Raises:
        KeyError: if that choice of experts was not measured.
        ValueError: if the two read different documents.
    """
    if first.tokens != second.tokens:
        raise ValueError("the two models were measured on different documents")
    return mean_of(paired(first.nats[method, keep_fraction], second.nats[FULL, 1.0], first.tokens))
