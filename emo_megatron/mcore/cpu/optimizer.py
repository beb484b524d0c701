"""Megatron's distributed optimizer over torch's AdamW: loading its checkpoints without Apex or Transformer Engine.

Megatron-Core 0.19 keeps that combination for machines without either, and its loading has three gaps: it reads the
optimizer step from states that exist only after a first step, copies into leaves that want gradients, and takes the
step of those first states for the stored one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def repair_loading() -> None:
    """Replace the methods of DistributedOptimizer that load; a resumed run equals an uninterrupted one bit for bit."""
    optimizer_class: Any = DistributedOptimizer
    state_dict = optimizer_class.state_dict
    load_state_dict = optimizer_class.load_state_dict
    set_states = optimizer_class._set_main_param_and_optimizer_states

    def state_dict_with_states(self: Any) -> Any:
        groups = self.optimizer.param_groups
        if not self.optimizer.state and any(group["params"] for group in groups):
            rates = [group["lr"] for group in groups]
            for group in groups:
                # a step that moves nothing: no gradient, no rate
                group["lr"] = 0.0
            self._init_optimizer_states_with_dummy_values()
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            for values in self.optimizer.state.values():
                values["step"].zero_()
        return state_dict(self)

    def load_state_dict_whole(self: Any, state: Any) -> None:
        with torch.no_grad():
            load_state_dict(self, state)
        if self.ddp_config.use_megatron_fsdp:
            # a Megatron-FSDP checkpoint holds the step of every parameter: nothing is to be repaired
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if "step" in self.optimizer.state.get(parameter, {}):
                    # a tensor for each: one for all would be advanced by every parameter
                    step = torch.tensor(float(group["step"]))
                    self.optimizer.state[parameter]["step"] = step

    def set_states_without_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None} | tensors)

    optimizer_class.state_dict = state_dict_with_states
    optimizer_class.load_state_dict = load_state_dict_whole
    optimizer_class._set_main_param_and_optimizer_states = set_states_without_step
