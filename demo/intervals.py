"""Differences between two losses, paired over validation documents, with standard errors.

Losses are in nats per token. Both models read the same documents, so the difference varies much less than either loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from emo_megatron.report.table import signed

type Documents = Mapping[str, list[float]]
"""Domain -> one number per validation document; the documents are always in the same order."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference between two losses."""

    nats: float
    """Nats per token."""
    error: float
    """Standard error over documents; nan if a domain has only one document."""

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{signed(self.nats)} (no standard error: a domain has one document)"
        return f"{signed(self.nats)} ± {self.error:.3f}"


def paired(first: Documents, second: Documents, tokens: Documents) -> dict[str, Difference]:
    """The first loss minus the second loss, per domain.

    Args:
        first: nats per document, summed over the document's tokens.
        second: nats of the second model, for the same documents.
        tokens: predicted tokens per document.

    Raises:
        ValueError: if the domains or the numbers of documents differ.
    """
    if not first.keys() == second.keys() == tokens.keys():
        raise ValueError(f"domains differ: {sorted(first)}, {sorted(second)}, {sorted(tokens)}")
    return {domain: _difference(first[domain], second[domain], tokens[domain]) for domain in tokens}


def _difference(first: list[float], second: list[float], tokens: list[float]) -> Difference:
    """The mean over tokens, with the standard error of a ratio of two sums: the sample is of documents, not tokens."""
    apart = [a - b for a, b in zip(first, second, strict=True)]
    total = sum(tokens)
    nats = sum(apart) / total
    rest = [d - nats * n for d, n in zip(apart, tokens, strict=True)]
    number = len(rest)
    variance = number / (number - 1) * sum(r * r for r in rest) if number > 1 else math.nan
    return Difference(nats=nats, error=math.sqrt(variance) / total)


def mean_of(differences: Mapping[str, Difference]) -> Difference:
    """The mean over domains. Every domain has the same weight."""
    return Difference(
        nats=fmean(d.nats for d in differences.values()),
        error=math.hypot(*(d.error for d in differences.values())) / len(differences),
    )
