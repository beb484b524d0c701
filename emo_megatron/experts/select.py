"""Choose experts: from statistics, by running the model layer by layer, at random; and how many.

Shapes: L layers with experts, E routed experts. Sources: arXiv 2605.06663, section 5, and its authors' code (mean
router probability, greedy by layer), 2504.06792 (EASY-EP), 2510.13999 (REAP).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emo_megatron.experts.calibration import Documents
from emo_megatron.experts.selection import Selection
from emo_megatron.experts.stats import ExpertStatistics, ModelFacts
from emo_megatron.finite import NotFiniteError, first_bad
from emo_megatron.runners.base import StudiedModel
from emo_megatron.runners.progress import Remember, anew

SCORES: Mapping[str, Callable[[ExpertStatistics], Tensor]] = {
    "mean_prob": lambda stats: stats.mean_probability_LE,
    "frequency": lambda stats: stats.frequency_LE,
    "easy_ep": lambda stats: stats.easy_ep_LE,
    "reap": lambda stats: stats.reap_LE,
}
"""Methods that rank experts by statistics: [L, E] float64, the best are kept."""
NEEDS_OUTPUTS = ("easy_ep", "reap")
"""Of those, the methods whose statistics are taken with outputs."""
RANDOM = "random"
LAYERWISE = "layerwise"
METHODS = (*SCORES, LAYERWISE, RANDOM)


def size_of(text: str, *, total: int) -> int:
    """Experts a layer that a size of `--keep` means where there are `total`, shared ones included.

    Raises:
        ValueError: it is neither a number nor a share.
    """
    number, is_share = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return round(float(number) / 100 * total) if is_share else int(number)
    except (OverflowError, ValueError):
        raise ValueError(f"--keep must be a number like 16 or a share like 12.5%; got {text!r}") from None


def parse_keep(text: str, facts: ModelFacts) -> int:
    """Routed experts a layer that `--keep` asks for.

    Args:
        text: experts a layer as the paper counts them, shared ones included: "16"; or a share of all of them, to the
            nearest number: "12.5%".
        facts: of the model.

    Raises:
        ValueError: it is neither, or a token could not be routed to top-k experts, or there are not so many.
    """
    total = facts.num_experts + facts.num_shared
    wanted, is_share = size_of(text, total=total), text.strip().endswith("%")
    least = facts.top_k + facts.num_shared
    if not least <= wanted <= total:
        raise ValueError(
            f"--keep must leave {least} to {total} experts a layer, {facts.num_shared} shared included: a token "
            f"goes to {facts.top_k} routed ones; got {text.strip()}{f', which is {wanted}' if is_share else ''}"
        )
    return wanted - facts.num_shared


def keep_for_budget(budget_mb: float, facts: ModelFacts, *, bytes_per_parameter: float) -> int:
    """Most routed experts a layer whose module's weights fit.

    Args:
        budget_mb: megabytes, 10^6 bytes, of all weights.
        facts: of the model.
        bytes_per_parameter: 2 for bfloat16.

    Raises:
        ValueError: not even top-k experts fit.
    """
    layer_bytes = len(facts.layers) * facts.expert_parameters * bytes_per_parameter
    fixed_bytes = facts.other_parameters * bytes_per_parameter
    room = (budget_mb * 1e6 - fixed_bytes) / layer_bytes
    # written so that numbers too large for their product fail too
    if not room >= facts.top_k:
        least = (fixed_bytes + facts.top_k * layer_bytes) / 1e6
        raise ValueError(
            f"--budget-mb must be {least:.1f} or more: that is the smallest module, with {facts.top_k} routed "
            f"experts a layer; got {budget_mb:g}"
        )
    return int(min(facts.num_experts, room))


def select_top(scores_LE: Tensor, *, keep: int) -> Tensor:
    """Keep each layer's best-scored experts.

    Args:
        scores_LE: [L, E], higher is better; for the paper's method the mean router probability.
        keep: experts kept a layer, in [1, E].

    Returns:
        [L, E] bool with `keep` True a row; ties go to the lower index.

    Raises:
        NotFiniteError: a score is not finite.
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


def select_layerwise(model: StudiedModel, documents: Documents, *, keep: int, remember: Remember = anew) -> Tensor:
    """Keep each layer's likeliest experts, measured with the earlier layers already reduced to theirs.

    A pass over the documents for every layer, as the authors do.

    Args:
        model: its experts are watched.
        documents: that choose the experts.
        keep: routed experts kept a layer.
        remember: knows layers that were decided before.

    Returns:
        [L, E] bool with `keep` True a row.
    """
    facts = model.facts
    allowed_LE = torch.ones(len(facts.layers), facts.num_experts, dtype=torch.bool)

    def likeliest(place: int) -> list[int]:
        stats = model.statistics(documents.tokens, outputs=False, allowed_LE=allowed_LE)
        (kept_E,) = select_top(stats.mean_probability_LE[place : place + 1], keep=keep)
        kept: list[int] = kept_E.nonzero().flatten().tolist()
        return kept

    def is_choice(kept: object) -> bool:
        if not isinstance(kept, list) or any(type(expert) is not int for expert in kept):
            return False
        return len(kept) == keep and kept == sorted({*kept} & {*range(facts.num_experts)})

    for place in tqdm(
        range(len(facts.layers)), desc="layer by layer", unit="layer", disable=None if model.is_writer else True
    ):
        name = f"{keep} experts: layer {facts.layers[place]}"
        kept = remember(name, functools.partial(likeliest, place), is_right=is_choice)
        allowed_LE[place] = False
        allowed_LE[place, kept] = True
    return allowed_LE


def select_by_stats(stats: ExpertStatistics, *, method: str, keep: int) -> Tensor:
    """The experts that a method keeps by statistics alone.

    Args:
        stats: of the calibration documents.
        method: one of SCORES.
        keep: routed experts kept a layer.

    Returns:
        [L, E] bool with `keep` True a row.

    Raises:
        ValueError: there is no such method, or the statistics were taken without what it needs.
    """
    if method not in SCORES:
        raise ValueError(f"statistics rank experts by {', '.join(SCORES)}; got {method}")
    return select_top(SCORES[method](stats), keep=keep)


def selection_of(keep_mask_LE: Tensor, facts: ModelFacts, *, method: str, seed: int, data: dict[str, Any]) -> Selection:
    """The Selection of a choice; the seed is told of random choices only."""
    return Selection.from_mask(
        keep_mask_LE,
        layers=facts.layers,
        method=method,
        seed=seed if method == RANDOM else None,
        model=facts.fingerprint,
        data=data,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaxRise:
    """How much more a module may lose on held-out documents than the whole model."""

    value: float
    """Nats a token, or a share of the whole model's loss."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> MaxRise:
        """Read "0.05" (nats a token) or "1%" (of the whole model's loss).

        Raises:
            ValueError: it is neither, negative, or not finite.
        """
        try:
            number = float(text.strip().removesuffix("%"))
        except ValueError:
            number = -1.0
        if not 0 <= number < math.inf:
            raise ValueError(f"--max-rise must be nats like 0.05 or a share like 1%; got {text}")
        is_share = text.strip().endswith("%")
        return cls(value=number / 100 if is_share else number, is_share=is_share)

    def highest(self, full_loss: float) -> float:
        """The highest loss that is allowed, nats a token."""
        return full_loss + self.value * (full_loss if self.is_share else 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Smallest:
    """The smallest module within a bound."""

    keep_mask_LE: Tensor
    """[L, E] bool."""
    full_loss: float
    """Nats a token, with all experts."""
    tried: dict[int, float]
    """Routed experts kept -> loss in nats a token, ascending."""


def smallest_within(
    model: StudiedModel,
    held_out: Documents,
    *,
    choose: Callable[[int], Tensor],
    bound: MaxRise,
    remember: Remember = anew,
) -> Smallest:
    """Find by bisection the fewest experts a layer whose loss stays within a bound.

    The loss is taken to rise as experts go. Where it does not, what is found still holds the bound, and one expert
    fewer does not; a smaller module may exist.

    Args:
        model: its loss is measured.
        held_out: documents that did not choose the experts.
        choose: routed experts kept a layer -> [L, E] bool.
        bound: what a module may lose.
        remember: knows losses that were measured before.
    """
    facts = model.facts

    def nats(allowed_LE: Tensor | None) -> float:
        return model.loss(held_out.tokens, allowed_LE=allowed_LE).nats

    full = remember("all experts: loss", functools.partial(nats, None), is_right=_is_loss)
    tried: dict[int, float] = {facts.num_experts: full}
    masks = {facts.num_experts: torch.ones(len(facts.layers), facts.num_experts, dtype=torch.bool)}
    # `low` is below what can be routed or too small, `high` is within the bound
    low, high = facts.top_k - 1, facts.num_experts
    with tqdm(
        total=(high - low - 1).bit_length(),
        desc="smallest module",
        unit="size",
        disable=None if model.is_writer else True,
    ) as bar:
        while high - low > 1:
            keep = (low + high) // 2
            masks[keep] = choose(keep)
            tried[keep] = remember(f"{keep} experts: loss", functools.partial(nats, masks[keep]), is_right=_is_loss)
            if tried[keep] <= bound.highest(full):
                high = keep
            else:
                low = keep
            bar.update()
    return Smallest(keep_mask_LE=masks[high], full_loss=full, tried={keep: tried[keep] for keep in sorted(tried)})


def _is_loss(nats: object) -> bool:
    return type(nats) in (int, float) and math.isfinite(nats)  # type: ignore[arg-type]
