"""Assign experts to expert-parallel ranks: experts that tokens use together share a rank, and no rank is overloaded.

Dispatch sends a token's row once to every rank with any of the token's experts. A token therefore needs fewer ranks if
experts that are used together are on one rank. This is balanced graph partitioning. Experts are nodes, the weight of an
edge is the number of tokens routed to both experts, and each rank is a part with E / R experts and a bounded load.
`coactivation` improves several starting placements by swaps of two experts, as Kernighan and Lin (1970) do. `load` is
the usual packing by loads alone (as in EPLB), for comparison. Co-activation counts pairs. With top-2 routing, the pairs
on one rank are exactly the saved rows; with more experts per token, the pairs are an approximation.

Shapes: L MoE layers, E routed experts, R ranks.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from emo_megatron.experts.selection import MOST_EXPERTS
from emo_megatron.experts.stats import ExpertStatistics
from emo_megatron.files import whole
from emo_megatron.finite import finite_number
from emo_megatron.json_files import are_layers, checked, is_a, read_own, to_json

FORMAT = "emo_megatron.placement.1"
Method = Literal["coactivation", "load"]
Ranks = npt.NDArray[np.int64]
"""[E], the rank of each expert."""
Weights = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A new order of the experts of each layer: rank r has the positions [r * E / R, (r + 1) * E / R)."""

    num_experts: int
    num_ranks: int
    layers: tuple[int, ...]
    """Numbers of the MoE layers, from 1."""
    order: tuple[tuple[int, ...], ...]
    """For each layer, the expert at each position."""
    model: str
    """`router_fingerprint` of the model."""
    method: str
    max_imbalance: float
    """Requested upper bound of the load of the most loaded rank, divided by the mean load."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_ranks"):
            if not is_a(getattr(self, name), int) or not 1 <= getattr(self, name) <= MOST_EXPERTS:
                raise ValueError(f"{name} must be a whole number in [1, {MOST_EXPERTS}]; got {getattr(self, name)!r}")
        _check_ranks(self.num_experts, self.num_ranks)
        _check_bound(self.max_imbalance, name="max_imbalance")
        if not are_layers(self.layers):
            raise ValueError(f"layers must be ascending numbers from 1; got {self.layers}")
        if len(self.order) != len(self.layers):
            raise ValueError(
                f"order must have one entry per layer; got {len(self.order)} for {len(self.layers)} layers"
            )
        for layer, order in zip(self.layers, self.order, strict=True):
            if not all(is_a(e, int) for e in order) or sorted(order) != [*range(self.num_experts)]:
                raise ValueError(
                    f"layer {layer}: the order must contain each of {self.num_experts} experts once; got "
                    f"{reprlib.repr(order)}"
                )

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer number -> order."""
        return dict(zip(self.layers, self.order, strict=True))

    def check_model(self, fingerprint: str, *, layers: Sequence[int]) -> None:
        """Raise ValueError if the placement was made for another model."""
        if fingerprint != self.model or tuple(layers) != self.layers:
            raise ValueError(
                "the placement is of another model, or of this model with another order of experts, because the "
                "routers differ: run stats and place on this checkpoint"
            )

    def save(self, path: Path) -> Path:
        """Write the file, complete or not at all; return the path."""
        with whole(path) as unfinished:
            unfinished.write_text(to_json({"format": FORMAT} | asdict(self)) + "\n")
        return path


def load_placement(path: Path) -> Placement:
    """Read a placement file; ValueError with the path for a file that is damaged or of another version."""
    if not path.exists():
        raise FileNotFoundError(f"there is no placement file {path}: write one with place")
    names = [f.name for f in fields(Placement)]
    stored = read_own(path, kind="a placement file", format=FORMAT, fields=names, made_by="place")
    kinds = {"layers": list, "order": list, "model": str, "method": str, "max_imbalance": float}
    checked(stored, kinds, where=str(path))
    try:
        for order in stored["order"]:
            if not isinstance(order, list):
                raise ValueError(f"order must have one list per layer; got {reprlib.repr(order)}")
        stored["layers"] = tuple(stored["layers"])
        stored["order"] = tuple(map(tuple, stored["order"]))
        return Placement(**stored)
    except ValueError as error:
        raise ValueError(f"{path} is a damaged placement file: {error}") from None


def place(
    stats: ExpertStatistics,
    *,
    num_ranks: int,
    method: Method = "coactivation",
    max_imbalance: float = 1.1,
    seed: int = 0,
) -> Placement:
    """Place the experts of every layer.

    Args:
        stats: measured on text that is similar to the text of the planned run.
        num_ranks: R, a divisor of E.
        method: `coactivation` or `load`.
        max_imbalance: bound of the load (tokens, counted once per expert) of the most loaded rank, divided by the mean
            load; at least 1. If the loads do not allow this bound, the bound is the highest load of a rank in the most
            balanced start.
        seed: of the order in which swaps are tried.
    """
    _check_ranks(stats.model.num_experts, num_ranks)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}; got {method!r}")
    _check_bound(max_imbalance, name="--max-imbalance")
    orders = []
    for coactivation_EE in stats.coactivation_LEE.double().numpy():
        load_E = coactivation_EE.diagonal().copy()
        rank_E = (
            pack_by_load(load_E, num_ranks=num_ranks)
            if method == "load"
            else place_by_coactivation(coactivation_EE, num_ranks=num_ranks, max_imbalance=max_imbalance, seed=seed)
        )
        orders.append(tuple(int(e) for e in np.argsort(rank_E, kind="stable")))
    return Placement(
        num_experts=stats.model.num_experts,
        num_ranks=num_ranks,
        layers=stats.model.layers,
        order=tuple(orders),
        model=stats.model.fingerprint,
        method=method,
        max_imbalance=max_imbalance,
    )


def pack_by_load(load_E: Weights, *, num_ranks: int) -> Ranks:
    """Assign the most loaded expert first, each to the least loaded rank with room: EPLB's packing without replicas."""
    size = len(load_E) // num_ranks
    rank_E = np.empty(len(load_E), np.int64)
    total_R, held_R = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    for expert in np.argsort(-load_E, kind="stable"):
        rank = int(np.where(held_R < size, total_R, np.inf).argmin())
        rank_E[expert] = rank
        total_R[rank] += load_E[expert]
        held_R[rank] += 1
    return rank_E


def place_by_coactivation(coactivation_EE: Weights, *, num_ranks: int, max_imbalance: float, seed: int) -> Ranks:
    """The best of several starts, each improved by swaps; other arguments as in `place`.

    coactivation_EE: [E, E] tokens routed to both experts; the diagonal is the number of tokens routed to each expert.
    """
    load_E = coactivation_EE.diagonal().copy()
    weight_EE = coactivation_EE - np.diag(load_E)
    starts = (
        pack_by_load(load_E, num_ranks=num_ranks),
        np.arange(len(load_E)) // (len(load_E) // num_ranks),
        _grow(weight_EE, load_E, num_ranks=num_ranks),
    )

    def fullest(rank_E: Ranks) -> float:
        return float(np.bincount(rank_E, weights=load_E, minlength=num_ranks).max())

    asked = max_imbalance * load_E.sum() / num_ranks
    rng = np.random.default_rng(seed)
    # the loads may not allow the requested bound; the most balanced start always satisfies the second bound
    for bound in (asked, min(map(fullest, starts))):
        ends = [_swap(start, weight_EE, load_E, num_ranks=num_ranks, bound=bound, rng=rng) for start in starts]
        if min(map(fullest, ends)) <= bound:
            break

    def worth(rank_E: Ranks) -> tuple[float, float]:
        # within the bound, only the pairs on one rank count
        return -max(fullest(rank_E), bound), float(weight_EE[rank_E[:, None] == rank_E].sum())

    return max(ends, key=worth)


def _grow(weight_EE: Weights, load_E: Weights, *, num_ranks: int) -> Ranks:
    """Fill one rank after the other: first the most loaded expert, then the experts with the most shared tokens."""
    size = len(load_E) // num_ranks
    rank_E = np.full(len(load_E), -1, np.int64)
    for rank in range(num_ranks):
        for place in range(size):
            wanted_E = load_E if place == 0 else weight_EE[:, rank_E == rank].sum(1)
            rank_E[int(np.where(rank_E < 0, wanted_E, -1.0).argmax())] = rank
    return rank_E


def _swap(
    start: Ranks, weight_EE: Weights, load_E: Weights, *, num_ranks: int, bound: float, rng: np.random.Generator
) -> Ranks:
    """Swap pairs of experts while this adds pairs on one rank or reduces load above the bound; never add such load."""
    rank_E, experts = start.copy(), np.arange(len(start))
    total_R = np.bincount(rank_E, weights=load_E, minlength=num_ranks)
    # tokens that expert e shares with the experts of rank r
    shared_ER = np.stack([weight_EE[:, rank_E == rank].sum(1) for rank in range(num_ranks)], 1)
    # load above the bound counts more than all pairs together
    heavy = 1 + 4 * weight_EE.sum() / max(bound, 1.0)
    has_moved = True
    while has_moved:
        has_moved = False
        for one in rng.permutation(experts):
            mine = rank_E[one]
            shift_E = load_E - load_E[one]
            gain_E = (
                shared_ER[one, rank_E]
                - shared_ER[one, mine]
                + shared_ER[:, mine]
                - shared_ER[experts, rank_E]
                - 2 * weight_EE[one]
            )
            relief_E = _relief(total_R[mine], total_R[rank_E], shift_E, bound=bound)
            gain_E = np.where(relief_E < 0, -np.inf, gain_E + heavy * relief_E)
            gain_E[rank_E == mine] = 0
            other = int(gain_E.argmax())
            if gain_E[other] <= 1e-6 * (1 + weight_EE[one].sum()):
                continue
            far, change_E = rank_E[other], weight_EE[:, other] - weight_EE[:, one]
            shared_ER[:, mine] += change_E
            shared_ER[:, far] -= change_E
            total_R[mine] += shift_E[other]
            total_R[far] -= shift_E[other]
            rank_E[one], rank_E[other] = far, mine
            has_moved = True
    return rank_E


def _relief(mine: float, theirs_E: Weights, shift_E: Weights, *, bound: float) -> Weights:
    """Reduction of the load above the bound on two ranks when the load `shift_E` moves from `theirs_E` to `mine`."""
    before_E = np.maximum(mine - bound, 0) + np.maximum(theirs_E - bound, 0)
    after_E = np.maximum(mine + shift_E - bound, 0) + np.maximum(theirs_E - shift_E - bound, 0)
    relief_E: Weights = before_E - after_E
    return relief_E


def _check_bound(max_imbalance: float, *, name: str) -> None:
    if finite_number(max_imbalance, what=name) < 1:
        raise ValueError(f"{name} must be at least 1; got {max_imbalance}")


def _check_ranks(num_experts: int, num_ranks: int) -> None:
    if num_ranks < 1 or num_experts % num_ranks:
        raise ValueError(
            f"--ranks must be a divisor of the number of experts; {num_experts} do not divide into {num_ranks}"
        )
