"""Train a part of the model only: the routed experts, all or some of them, alone or with the routers.

Everything else is frozen before Megatron wraps the model, so that frozen weights get no gradient, no optimizer state
and no weight decay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

# the experts of the local layers, and of Transformer Engine's
_EXPERT = re.compile(r"local_experts\.(\d+)\..+|linear_fc[12]\.(?:weight|bias)(\d+)")

TrainOnly = Literal["experts", "experts+router", "all"]
Experts = Mapping[int, Collection[int]]
"""Number of an MoE layer -> experts of the whole model."""


def freeze_hook(policy: TrainOnly, *, experts: Experts | None = None) -> Callable[[list[Any]], list[Any]]:
    """`freeze` for Megatron to call with the model's chunks before it wraps them."""

    def hook(chunks: list[Any]) -> list[Any]:
        if _over_stage(sum(freeze(chunk, policy=policy, experts=experts) for chunk in chunks)) == 0:
            raise ValueError(
                f"--train-only {policy} leaves this pipeline stage nothing to train: give every stage an MoE layer"
            )
        return chunks

    return hook


def freeze(model: torch.nn.Module, *, policy: TrainOnly, experts: Experts | None = None) -> int:
    """Freeze all that the policy does not name, in a pipeline stage's chunk of a model that is not wrapped yet.

    With `experts` only these of the routed experts stay trainable. Returns how many parameters (numbers) of this rank
    do.
    """
    if policy != "all":
        model.requires_grad_(False)
        for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
            if experts is not None and layer.layer_number not in experts:
                raise ValueError(
                    f"--train-selection names the MoE layers {(*experts,)}; the model has one at {layer.layer_number}"
                )
            if policy == "experts+router":
                layer.router.requires_grad_(True)
            for expert, parameter in expert_parameters(layer):
                parameter.requires_grad_(experts is None or expert in experts[layer.layer_number])
        embedding = getattr(model, "embedding", None)
        if embedding is not None:
            # a checkpointed layer is differentiated only if one of its inputs needs a gradient
            embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(torch.is_grad_enabled()))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _over_stage(number: int) -> int:
    """The sum over the ranks of this pipeline stage: one of them may have none of the experts that are trained."""
    if not parallel_state.model_parallel_is_initialized():
        return number
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    total = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def expert_parameters(layer: MoELayer) -> list[tuple[int, Tensor]]:
    """This rank's parameters of routed experts, with the number that each expert has in the whole model."""
    found = []
    for name, parameter in layer.experts.named_parameters():
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise ValueError(f"the experts' weights lie in one parameter ({name}): drop --moe-single-grouped-weight")
        found.append((layer.local_expert_indices[int(match[1] or match[2])], parameter))
    return found
