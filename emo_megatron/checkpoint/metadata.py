"""What choosing experts needs to know of a Megatron checkpoint, read from its files."""

from __future__ import annotations

import math

from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.experts.selection import router_fingerprint
from emo_megatron.experts.stats import ModelFacts


def facts_of(checkpoint: MegatronCheckpoint) -> ModelFacts:
    """Facts of the model in a checkpoint.

    Raises:
        ValueError: it has no routed experts.
    """
    layers = checkpoint.moe_layers
    if not layers:
        raise ValueError(f"the model in {checkpoint.path} has no routed experts")
    args = checkpoint.args
    num_experts = int(args.num_experts)
    sizes = {name: math.prod(info.shape) for name, info in checkpoint.names.items()}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name or name.endswith(".mlp.router.weight"))
    stored = {info.dtype for name, info in checkpoint.names.items() if ".mlp.experts." in name}
    return ModelFacts(
        fingerprint=router_fingerprint(checkpoint.layer_view(number).read("mlp.router.weight") for number in layers),
        num_experts=num_experts,
        num_shared=num_shared_experts(args),
        top_k=int(args.moe_router_topk),
        layers=layers,
        expert_parameters=routed // (len(layers) * num_experts),
        other_parameters=sum(sizes.values()) - routed,
        bytes_per_parameter=max(dtype.itemsize for dtype in stored),
    )


def num_shared_experts(args: object) -> int:
    """Shared experts as the paper counts them: Megatron has one, as wide as all of them together."""
    width = getattr(args, "moe_shared_expert_intermediate_size", None) or 0
    return -(-width // (getattr(args, "moe_ffn_hidden_size", None) or width)) if width else 0
