"""Checks that weights and measured numbers are finite; errors name the layer (from 1) and the expert (from 0).

NaN sorts first and passes comparisons, so it could decide a choice of experts or appear as a result. All numbers that
are read, computed, measured or written go through these checks.
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
    """Index of the first value that is not finite; None if all values are finite or the tensor stores no values."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return None
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # aminmax allocates no temporary tensor and propagates NaN
    low, high = tensor.detach().aminmax()
    if low.isfinite() & high.isfinite():
        return None
    return tuple((~tensor.isfinite()).nonzero()[0].tolist())


def check_weight(name: str, weight: Tensor, *, layer: int | None = None, experts: int | Sequence[int] = ()) -> None:
    """Raise an error if a weight is not finite.

    Args:
        name: name in the checkpoint.
        weight: the whole weight or a part.
        layer: number of the weight's layer, from 1; None outside the layers.
        experts: the weight's routed expert; or a sequence with the routed expert of each row of the weight.

    Raises:
        NotFiniteError: a value is NaN or infinite; names the weight, the layer and the expert.
    """
    bad = first_bad(weight)
    if bad is None:
        return
    expert = experts if isinstance(experts, int) else experts[bad[0]] if experts else None
    numbers = (("layer", layer), ("expert", expert))
    place = ", ".join(f"{word} {number}" for word, number in numbers if number is not None)
    raise NotFiniteError(
        f"weights must be finite; {name}{f' ({place})' if place else ''} holds {weight[bad].item()}: use an earlier "
        "checkpoint whose weights are finite"
    )


def check_named_weight(name: str, weight: Tensor, *, said: str | None = None) -> None:
    """Raise an error if a weight is not finite; its layer and expert are read from its name.

    Args:
        name: name in a transformers checkpoint, layer and expert from 0: `model.layers.0.mlp.experts.3.up_proj.weight`.
        weight: the whole weight.
        said: the name for the error, if it differs from `name`.
    """
    found = _PLACE.fullmatch(name)
    layer, expert = (None, None) if found is None else (found["layer"], found["expert"])
    experts: int | Sequence[int] = int(expert) if expert is not None else ()
    if _ROUTER.fullmatch(name):
        experts = range(len(weight))
    check_weight(said or name, weight, layer=None if layer is None else int(layer) + 1, experts=experts)


def finite_number(value: object, *, what: str) -> float:
    """`value` as a float; a ValueError that names `what` if `value` is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number; got {value!r}")
    return float(value)
