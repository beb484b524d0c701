"""The checks of bench_model.py before timing: a model with pools of all experts against the standard model.

The routers of each layer are compared on the same input with a tight tolerance, except near ties (routers.CLEAR_GAP).
Loss and gradients of the whole model are compared with a loose tolerance: in bf16, a difference in the last bit of one
layer may change the choice of experts at a near tie in the next layer.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from models import ALL_EXPERTS, EMO, STANDARD, Training
from routers import NUM_SPARE, is_clear_choice
from torch import Tensor

WEIGHT_TOLERANCE = 1e-4
"""Of the largest routing weight of a layer."""
LOSS_TOLERANCE = 1e-4
"""Of the loss."""
GRADIENT_TOLERANCE = 0.05
"""Of the norm of the gradients of one kind of weight, all layers and experts together: a near tie that falls the other
way is much for an expert with few tokens, and little for all of them."""


def check_models(training: Training) -> None:
    """Compare pools of all experts with the standard model, and look whether pools are kept to.

    Raises:
        ValueError: naming what differs: there is nothing to time.
    """
    standard = _routers(training.models[STANDARD])

    def same_routing(number: int, router: Any, inputs: Any, output: Any) -> None:
        _compare_routing(number, router, standard[number], inputs[0], output)

    with _watched(training.models[ALL_EXPERTS], same_routing):
        found = _gradients(training, ALL_EXPERTS)
    _compare(found, _gradients(training, STANDARD))
    with _watched(training.models[EMO], _look_for_strays):
        loss, _ = _gradients(training, EMO)
    if not loss < float("inf"):  # NaN is not below
        raise ValueError(f"the loss of {EMO} is {loss}, so nothing is reported")


def _routers(model: Any) -> dict[int, Any]:
    """Layer number -> router."""
    return {layer.layer_number: layer.mlp.router for layer in model.module.decoder.layers}


@contextmanager
def _watched(model: Any, look: Callable[[int, Any, Any, Any], None]) -> Iterator[None]:
    """Call `look` with layer number, router, inputs and output of every router's forward pass."""
    with ExitStack() as stack:
        for number, router in _routers(model).items():
            handle = router.register_forward_hook(
                lambda router, inputs, output, number=number: look(number, router, inputs, output)
            )
            stack.callback(handle.remove)
        yield


def _compare_routing(number: int, router: Any, standard: Any, hidden: Tensor, found: Any) -> None:
    with torch.no_grad():
        want_probs_TE, want_map_TE = standard(hidden)
        logits_TE = standard.gating(hidden).flatten(0, -2).float()
    standard.reset_global_aux_loss_tracker()
    probs_TE, map_TE = found
    is_clear_T = is_clear_choice(logits_TE, top_k=router.topk)
    close = 1 - is_clear_T.float().mean().item()
    problems = [f"{close:.2%} of the tokens are near ties"] if close > NUM_SPARE else []
    if not torch.equal(map_TE[is_clear_T], want_map_TE[is_clear_T]):
        problems.append("it chooses other experts")
    differences_TE = (probs_TE.detach() - want_probs_TE)[is_clear_T].abs()
    error = (differences_TE.max() / want_probs_TE.max()).item()
    if not error < WEIGHT_TOLERANCE:  # NaN is not below
        problems.append(f"its weights differ by {error:.1e} of the largest")
    if problems:
        raise ValueError(
            f"the router of layer {number} with pools of all experts does not route as the standard one does, "
            f"so nothing is reported: {'; '.join(problems)}"
        )


def _look_for_strays(number: int, router: Any, inputs: Any, output: Any) -> None:
    scope, map_TE = router.scope, output[1]
    if (map_TE & ~scope.pools[number][scope.document_ids_T]).any():
        raise ValueError(f"tokens leave the pool of their document in layer {number}, so nothing is reported")


def _gradients(training: Training, name: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first batch and the gradient of every weight."""
    loss = training.loss(name, 0)
    training.backward(loss)
    weights = training.models[name].named_parameters()
    return loss.item(), {weight: value.main_grad.clone() for weight, value in weights}


def _compare(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    says = f"{ALL_EXPERTS} does not compute what the standard model does, so nothing is reported"
    (loss, gradients), (want_loss, want_gradients) = found, wanted
    if not abs(loss - want_loss) < LOSS_TOLERANCE * abs(want_loss):
        raise ValueError(f"{says}: its loss is {loss:.6f}, the standard model's {want_loss:.6f}")
    squares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for weight, want in want_gradients.items():
        of_kind = squares[re.sub(r"\d+", "*", weight)]
        of_kind[0] += (gradients[weight] - want).square().sum().item()
        of_kind[1] += want.square().sum().item()
    for kind, (difference, whole) in squares.items():
        error = math.sqrt(difference / max(whole, 1e-30))
        if not error < GRADIENT_TOLERANCE:
            raise ValueError(f"{says}: its gradient of {kind} differs by {error:.1e} of the norm")
