"""Choose experts from statistics or at random, and how many. `runners.search` chooses by running the model.

Shapes: L layers with experts, E routed experts. Sources: arXiv 2605.06663, section 5, and its authors' code (mean
router probability, greedy by layer), 2504.06792 (EASY-EP), 2510.13999 (REAP).
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
    """A way to rank experts."""

    summary: str
    """For --help."""
    scores: Callable[[ExpertStatistics], Tensor] | None = None
    """[L, E] float64, the best are kept; None where statistics do not tell."""
    needs_outputs: bool = False
    """Whether the statistics must be taken with the outputs of experts."""


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
"""All that is to be known of a method: another one is another entry."""
METHODS_HELP = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items()) + "."


def check_method(name: str, *, flag: str) -> None:
    """Refuse a name that is not in METHODS."""
    if name not in METHODS:
        raise ValueError(f"{flag} must be of {', '.join(METHODS)}; got {name}")


def parse_size(text: str, *, num_experts: int) -> int:
    """Routed experts per layer that a size means in a model with `num_experts` routed experts per layer.

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
    if re.fullmatch(r"[+-]?\d+", text.strip()):
        hint = ". Earlier releases counted the shared experts too: for a model with one shared expert, "
        hint += f'"{int(text) - 1} routed" is what they called {text.strip()}'
    raise ValueError(
        "--keep must be a share of the routed experts, such as 25%, or a number of routed experts per layer, such as "
        f'"8 routed"; got {text!r}{hint}'
    )


def parse_keep(text: str, *, num_experts: int, top_k: int) -> int:
    """Routed experts per layer that `--keep` asks for: `parse_size` within what a module can have."""
    keep = parse_size(text, num_experts=num_experts)
    if not top_k <= keep <= num_experts:
        meaning = f", which is {keep}" if text.strip().endswith("%") else ""
        raise ValueError(
            f"--keep must leave {top_k} to {num_experts} routed experts per layer, because every token is routed to "
            f"{top_k} of them; got {text.strip()}{meaning}"
        )
    return keep


def keep_for_budget(budget_mb: float, metadata: ModelMetadata, *, bytes_per_parameter: float) -> int:
    """Most routed experts per layer of a module all of whose weights fit in `budget_mb` megabytes of 10^6 bytes."""
    layer_bytes = len(metadata.layers) * metadata.expert_parameters * bytes_per_parameter
    fixed_bytes = metadata.other_parameters * bytes_per_parameter
    room = (budget_mb * 1e6 - fixed_bytes) / layer_bytes
    # written so that numbers too large for their product fail too
    if not room >= metadata.top_k:
        least = (fixed_bytes + metadata.top_k * layer_bytes) / 1e6
        raise ValueError(
            f"--budget-mb must be {least:.1f} or more: that is the smallest module, with {metadata.top_k} routed "
            f"experts a layer; got {budget_mb:g}"
        )
    return int(min(metadata.num_experts, room))


def select_top(scores_LE: Tensor, *, keep: int) -> Tensor:
    """Keep each layer's `keep` best-scored experts, of scores [L, E] that must be finite; higher is better.

    Returns:
        [L, E] bool with `keep` True a row; ties go to the lower index.
    """
    bad = first_bad(scores_LE)
    if bad is not None:
        # NaN would come first
        raise NotFiniteError(
            f"scores that rank experts must be finite; expert {bad[1]} has {float(scores_LE[bad])} in row "
            f"{bad[0] + 1} of {len(scores_LE)}, one a layer with experts"
        )
    order_LE = scores_LE.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores_LE, dtype=torch.bool).scatter_(1, order_LE[:, :keep], True)


def select_random(*, num_layers: int, num_experts: int, keep: int, seed: int) -> Tensor:
    """Keep `keep` experts a layer at random, [L, E] bool; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return select_top(torch.rand(num_layers, num_experts, generator=generator), keep=keep)


def select_by_stats(stats: ExpertStatistics, *, method: str, keep: int) -> Tensor:
    """The experts that a method with scores keeps by statistics alone, [L, E] bool with `keep` True a row."""
    scores = METHODS[method].scores
    assert scores is not None, "what runs the model, or chance, needs no statistics"
    return select_top(scores(stats), keep=keep)


def selection_of(
    keep_mask_LE: Tensor, metadata: ModelMetadata, *, method: str, seed: int, data: dict[str, Any]
) -> Selection:
    """The Selection of a choice; the seed is told of random choices only."""
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
    """How much more a module may lose on validation documents than the whole model."""

    value: float
    """Nats a token, or a share of the whole model's loss."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> MaxLossIncrease:
        """Read "0.05" (nats a token) or "1%" (of the whole model's loss)."""
        try:
            number = float(text.strip().removesuffix("%"))
        except ValueError:
            number = -1.0
        if not 0 <= number < math.inf:
            raise ValueError(f"--max-loss-increase must be nats like 0.05 or a share like 1%; got {text}")
        is_share = text.strip().endswith("%")
        return cls(value=number / 100 if is_share else number, is_share=is_share)

    def highest(self, full_loss: float) -> float:
        """The highest loss that is allowed, nats a token."""
        return full_loss + self.value * (full_loss if self.is_share else 1.0)
