"""Steps that the host runs again: the counts of the first run are removed, so that every step counts once.

This works for batches with document boundaries. Other batches behave as in Megatron.

megatron.training can run a step again before the optimizer. If a dispatcher's or a stash's buffer was too small
(--moe-expert-rank-capacity-factor), the second run has no limit. If the re-run state machine doubts a result, the step
is repeated unchanged. Data, micro-batch numbers, consumed samples and pools are equal in both runs. But the first run
has changed the expert bias and the counts.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import rerun_state_machine
from torch import Tensor

from emo_megatron.mcore.metrics import forget_layer


@dataclass(kw_only=True)
class Runs:
    """A router's current step, and the run of that step."""

    consumed_samples: int | None = None
    """Consumed samples of the step; None before the first step."""
    is_rerun: bool = False
    """Whether the state machine runs the step again."""
    has_ended: bool = False
    """Whether the host has checked for dropped tokens; this check ends a run."""
    bias_E: Tensor | None = None
    """The router's expert bias when the step began."""


def begin_run(router: Any, consumed_samples: int) -> None:
    """Undo a training router's counts if this micro-batch begins another run of the same step."""
    runs, is_rerun = router.runs, _is_rerun()
    is_same_step = consumed_samples == runs.consumed_samples
    if is_same_step and not runs.has_ended and is_rerun == runs.is_rerun:
        return
    runs.consumed_samples, runs.is_rerun, runs.has_ended = consumed_samples, is_rerun, False
    if is_same_step:
        router.reset_global_aux_loss_tracker()
        for number in router.layer_numbers:
            forget_layer(number)
        if runs.bias_E is not None:
            router.expert_bias.copy_(runs.bias_E)
            router.local_tokens_per_expert.zero_()
    elif router.enable_expert_bias:
        runs.bias_E = router.expert_bias.clone()


def _is_rerun() -> bool:
    # not the public getter, which creates and logs a new machine if there is none
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    return machine is not None and machine.state is rerun_state_machine.RerunState.RERUNNING_IN_PLACE


def follow_reruns(dispatcher: Any, router: Any) -> None:
    """Make a dispatcher that can drop tokens report to its router when the host has checked for dropped tokens."""
    if hasattr(dispatcher, "check_over_budget"):
        # attributes instead of a closure, because a copy of the layer has another router
        dispatcher.pool_router = router
        dispatcher.check_over_budget = types.MethodType(_check_over_budget, dispatcher)


def _check_over_budget(dispatcher: Any) -> Tensor | None:
    # the host also checks evaluation, which runs between two steps
    if dispatcher.pool_router.training:
        dispatcher.pool_router.runs.has_ended = True
    return type(dispatcher).check_over_budget(dispatcher)


def raise_over_budget(model: Iterable[torch.nn.Module], *, group: Any = None) -> None:
    """Raise if a dispatcher dropped tokens in this step. Every rank must call this between backward and optimizer.

    For training loops that do not repeat such a step; megatron.training does. Synchronises with the device once.

    Args:
        model: this rank's model chunks.
        group: ranks to check; None: all ranks.
    """
    flags_L = []
    for module in (module for chunk in model for module in chunk.modules()):
        dispatcher: Any = getattr(module, "token_dispatcher", None)
        if hasattr(dispatcher, "check_over_budget"):
            # the method of the class: the layer's method would announce another run, which does not follow
            flag = type(dispatcher).check_over_budget(dispatcher)
            if flag is not None:
                flags_L.append(flag.view(-1)[0].clone())
                dispatcher.reset_over_budget()
    num_ranks = torch.zeros((), dtype=torch.int32, device="cuda")
    if flags_L:
        num_ranks += torch.stack(flags_L).any()
    torch.distributed.all_reduce(num_ranks, group=group)
    if (count := int(num_ranks)) > 0:
        raise ValueError(
            f"{count} ranks received more tokens in this step than --moe-expert-rank-capacity-factor allows, and "
            "dropped tokens. Increase the factor, or drop the flag"
        )
