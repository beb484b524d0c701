"""Weights and measured numbers are finite, or an error says where they are not: layers count from 1, experts from 0.

NaN sorts first and no comparison refuses it, so that it would be taken for a choice of experts or a result. What is
read, run, measured or written goes through these checks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import Tensor

_PLACE = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\bexperts\.(?P<expert>\d+)\.)?.*")
_ROUTER = re.compile(r".*\.mlp\.gate\.weight")


class NotFiniteError(ValueError):
    """A number is NaN or infinite."""


def first_bad(tensor: Tensor) -> tuple[int, ...] | None:
    """The index of the first value that is not finite; None if all are finite, or none is stored."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return None
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # needs no memory, and NaN comes through
    low, high = tensor.detach().aminmax()
    if low.isfinite() & high.isfinite():
        return None
    return tuple((~tensor.isfinite()).nonzero()[0].tolist())


def check_weight(name: str, weight: Tensor, *, layer: int | None = None, experts: int | Sequence[int] = ()) -> None:
    """Refuse a weight that is not finite.

    Args:
        name: as the checkpoint names it.
        weight: all of it, or a part.
        layer: its number, from 1; None outside the layers.
        experts: the routed expert it is of; or those that its first axis counts, in order.

    Raises:
        NotFiniteError: naming the weight, the layer and the expert.
    """
    bad = first_bad(weight)
    if bad is None:
        return
    expert = experts if isinstance(experts, int) else experts[bad[0]] if experts else None
    numbers = (("layer", layer), ("expert", expert))
    place = ", ".join(f"{word} {number}" for word, number in numbers if number is not None)
    raise NotFiniteError(
        f"the weight {name}{f' ({place})' if place else ''} holds {weight[bad].item()}, and weights must be finite: "
        "take a checkpoint from before they became so"
    )


def check_named_weight(name: str, weight: Tensor, *, said: str | None = None) -> None:
    """Refuse a weight that is not finite, by a name that tells its layer and expert, both counted from 0.

    Args:
        name: of a transformers checkpoint (`model.layers.0.mlp.experts.3.up_proj.weight`).
        weight: all of it.
        said: the name for the error, if it is another.
    """
    found = _PLACE.fullmatch(name)
    layer, expert = (None, None) if found is None else (found["layer"], found["expert"])
    experts: int | Sequence[int] = int(expert) if expert is not None else ()
    if _ROUTER.fullmatch(name):
        experts = range(len(weight))
    check_weight(said or name, weight, layer=None if layer is None else int(layer) + 1, experts=experts)


def finite_number(value: object, *, what: str) -> float:
    """`value` as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number; got {value!r}")
    return float(value)
