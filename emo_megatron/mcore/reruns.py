"""Steps that the host runs again: what their first run counted is taken back, so that a step counts once.

Where batches have document boundaries; without them it is as in Megatron.

megatron.training runs a step again before the optimizer: without a bound when a dispatcher's or a stash's buffer was
too small (--moe-expert-rank-capacity-factor), and as it is when its re-run state machine doubts a result. Data,
micro-batch numbers and consumed samples are those of the first run, and so are the pools. But that run has moved the
expert bias and left its counts.
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
    """Which run of which step a router is in."""

    consumed_samples: int | None = None
    """Of the step; None before the first."""
    is_rerun: bool = False
    """Whether the state machine runs it again."""
    has_ended: bool = False
    """Whether the host has looked for dropped tokens, which it does at the end of a run."""
    bias_E: Tensor | None = None
    """The router's expert bias when the step began."""


def begin_run(router: Any, consumed_samples: int) -> None:
    """Take back what a router in training has counted if this micro-batch begins another run of its step."""
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
    # the public getter makes a machine where there is none, and says so
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    return machine is not None and machine.state is rerun_state_machine.RerunState.RERUNNING_IN_PLACE


def follow_reruns(dispatcher: Any, router: Any) -> None:
    """Let a layer's dispatcher, if it may drop tokens, tell its router when the host has looked for them."""
    if hasattr(dispatcher, "check_over_budget"):
        # attributes, not a closure: a copy of the layer has a router of its own
        dispatcher.pool_router = router
        dispatcher.check_over_budget = types.MethodType(_check_over_budget, dispatcher)


def _check_over_budget(dispatcher: Any) -> Tensor | None:
    # evaluation is checked too, between two steps
    if dispatcher.pool_router.training:
        dispatcher.pool_router.runs.has_ended = True
    return type(dispatcher).check_over_budget(dispatcher)


def raise_over_budget(model: Iterable[torch.nn.Module], *, group: Any = None) -> None:
    """Refuse a step in which a dispatcher dropped tokens. Every rank calls it after backward, before the optimizer.

    For training loops that do not run such a step again, as megatron.training does. Waits for the device, once.

    Args:
        model: this rank's chunks.
        group: ranks to ask; None: all.
    """
    flags_L = []
    for module in (module for chunk in model for module in chunk.modules()):
        dispatcher: Any = getattr(module, "token_dispatcher", None)
        if hasattr(dispatcher, "check_over_budget"):
            # the class's own: no run of the same step follows, which the layer's would announce
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
            "dropped some: raise it, or drop the flag"
        )
