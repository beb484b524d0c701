"""Choose experts by statistics or at random, and parse sizes. `runners.search` chooses experts by running the model.

Shapes: L MoE layers, E routed experts. Sources: arXiv 2605.06663, section 5, and the authors' code (mean router
probability, greedy by layer), 2504.06792 (EASY-EP), 2510.13999 (REAP).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emo_megatron.experts.selection import Selection
from emo_megatron.experts.stats import ExpertStatistics, ModelMetadata
from emo_megatron.finite import NotFiniteError, first_bad


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method to rank experts."""

    summary: str
    """Text for --help."""
    scores: Callable[[ExpertStatistics], Tensor] | None = None
    """[L, E] float64, higher is better; None if the method does not use statistics."""
    needs_outputs: bool = False
    """Whether the method requires statistics that were measured with --outputs."""


RANDOM = "random"
LAYERWISE = "layerwise"
METHODS: Mapping[str, Method] = {
    "mean_prob": Method(summary="mean router probability (the paper)", scores=lambda stats: stats.mean_probability_LE),
    "frequency": Method(summary="share of tokens routed to the expert", scores=lambda stats: stats.frequency_LE),
    LAYERWISE: Method(
        summary="mean_prob of each layer, measured while the earlier layers already run with fewer experts"
    ),
    "easy_ep": Method(
        summary="size of the expert outputs and of the change of the residual stream (EASY-EP); needs stats --outputs",
        scores=lambda stats: stats.easy_ep_LE,
        needs_outputs=True,
    ),
    "reap": Method(
        summary="mean size of the expert outputs (REAP); needs stats --outputs",
        scores=lambda stats: stats.reap_LE,
        needs_outputs=True,
    ),
    RANDOM: Method(summary="random experts"),
}
"""All methods; a new method is a new entry."""
METHODS_HELP = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + "."


def check_method(name: str, *, flag: str) -> None:
    """Raise ValueError for a name that is not in METHODS."""
    if name not in METHODS:
        raise ValueError(f"{flag} must be one of {', '.join(METHODS)}; got {name}")


def parse_size(text: str, *, num_experts: int) -> int:
    """The number of routed experts per layer, from a size and the model's routed experts per layer.

    A size is a share of the routed experts, "25%", rounded to the nearest number, or a number of them, "8 routed".
    """
    number, is_share = text.strip().removesuffix("%"), text.strip().endswith("%")
    words = text.split()
    try:
        if is_share:
            return round(float(number) / 100 * num_experts)
        if len(words) == 2 and words[1] == "routed":
            return int(words[0])
    except (OverflowError, ValueError):
        pass
    hint = ""
    if re.fullmatch(r"\d{1,9}", text.strip()) and int(text) > 1:
        hint = ". Earlier releases counted the shared experts too: for a model with one shared expert, "
        hint += f'"{int(text) - 1} routed" is what they called {text.strip()}'
    raise ValueError(
        "--keep must be a share of the routed experts, such as 25%, or a number of routed experts per layer, such as "
        f'"8 routed"; got {text!r}{hint}'
    )


def parse_keep(text: str, *, num_experts: int, top_k: int) -> int:
    """The number of routed experts per layer for `--keep`: `parse_size`, and a check against [top_k, num_experts]."""
    keep = parse_size(text, num_experts=num_experts)
    if not top_k <= keep <= num_experts:
        meaning = f", which is {keep}" if text.strip().endswith("%") else ""
        raise ValueError(
            f"--keep must leave {top_k} to {num_experts} routed experts per layer, because every token is routed to "
            f"{top_k} of them; got {text.strip()}{meaning}"
        )
    return keep


def keep_for_budget(budget_mb: float, metadata: ModelMetadata, *, bytes_per_parameter: float) -> int:
    """The most routed experts per layer such that all weights of the module fit in `budget_mb` * 10^6 bytes."""
    layer_bytes = len(metadata.layers) * metadata.expert_parameters * bytes_per_parameter
    fixed_bytes = metadata.other_parameters * bytes_per_parameter
    room = (budget_mb * 1e6 - fixed_bytes) / layer_bytes
    # `not >=` also catches NaN, the result of numbers that overflow
    if not room >= metadata.top_k:
        least = (fixed_bytes + metadata.top_k * layer_bytes) / 1e6
        raise ValueError(
            f"--budget-mb must be {least:.1f} or more, the size of the smallest module with {metadata.top_k} routed "
            f"experts per layer; got {budget_mb:g}"
        )
    return int(min(metadata.num_experts, room))


def select_top(scores_LE: Tensor, *, keep: int) -> Tensor:
    """Keep the `keep` experts with the highest scores in each layer; scores [L, E] must be finite.

    Returns:
        [L, E] bool with `keep` True per row; ties go to the lower index.
    """
    bad = first_bad(scores_LE)
    if bad is not None:
        # a sort would rank NaN first
        raise NotFiniteError(
            f"scores that rank experts must be finite; expert {bad[1]} has {float(scores_LE[bad])} in row "
            f"{bad[0] + 1} of {len(scores_LE)}, with one row per MoE layer"
        )
    order_LE = scores_LE.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_LE, dtype=torch.bool).scatter_(1, order_LE[:, :keep], True)


def select_random(*, num_layers: int, num_experts: int, keep: int, seed: int) -> Tensor:
    """Keep `keep` random experts per layer, [L, E] bool; equal seeds give equal results."""
    generator = torch.Generator().manual_seed(seed)
    return select_top(torch.rand(num_layers, num_experts, generator=generator), keep=keep)


def select_by_stats(stats: ExpertStatistics, *, method: str, keep: int) -> Tensor:
    """The experts that a method keeps by its scores of the statistics, [L, E] bool with `keep` True per row."""
    scores = METHODS[method].scores
    assert scores is not None, "methods that run the model, and random, do not use statistics"
    return select_top(scores(stats), keep=keep)


def selection_of(
    keep_mask_LE: Tensor, metadata: ModelMetadata, *, method: str, seed: int, data: dict[str, Any]
) -> Selection:
    """The Selection of a mask; the Selection stores `seed` only for the method `random`."""
    return Selection.from_mask(
        keep_mask_LE,
        layers=metadata.layers,
        method=method,
        seed=seed if method == RANDOM else None,
        model=metadata.fingerprint,
        data=data,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxLossIncrease:
    """The largest accepted loss increase of a module on validation documents, compared with the whole model."""

    value: float
    """Nats per token, or a share of the whole model's loss."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> MaxLossIncrease:
        """Parse "0.05" (nats per token) or "1%" (of the whole model's loss)."""
        try:
            number = float(text.strip().removesuffix("%"))
        except ValueError:
            number = -1.0
        if not 0 <= number < math.inf:
            raise ValueError(
                f"--max-loss-increase must be nats per token, such as 0.05, or a share, such as 1%; got {text}"
            )
        is_share = text.strip().endswith("%")
        return cls(value=number / 100 if is_share else number, is_share=is_share)

    def highest(self, full_loss: float) -> float:
        """The highest accepted loss, in nats per token."""
        return full_loss + self.value * (full_loss if self.is_share else 1.0)
