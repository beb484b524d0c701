"""One MoE layer over expert-parallel ranks with Megatron's alltoall dispatcher and with the deduplicating one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timing import Step
from torch import Tensor

TOLERANCE = 1e-6
"""Of a tensor's norm; float32."""
STOCK, DEDUP = "Megatron alltoall", "dedup"


@dataclass(frozen=True, kw_only=True)
class DispatchSize:
    """The layer and its tokens."""

    tokens: int
    """On every rank."""
    model_dim: int
    experts: int
    ffn_dim: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one dispatch of this rank sends."""

    rows: int
    """Hidden states, those for this rank's own experts included."""
    crossing_bytes: int
    """Of everything sent to other ranks, dispatch and combine, forward."""


class Dispatchers:
    """A layer that runs the whole step, or the dispatch and the combine alone, with either dispatcher.

    Args:
        size: of the layer.
        ranks: expert-parallel ranks; this process is one of them.
    """

    def __init__(self, size: DispatchSize, *, ranks: int) -> None:
        self.size, self.ranks = size, ranks
        self.layer = _build(size)
        stock = self.layer.token_dispatcher
        self.dispatchers = {STOCK: stock, DEDUP: _dedup(self.layer)}
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.routing_map_TE = uniform_routing(size, generator=generator)
        probs_TE = torch.rand(self.routing_map_TE.shape, generator=generator)
        self.probs_TE = probs_TE * self.routing_map_TE
        self.hidden = torch.randn(size.tokens, 1, size.model_dim, generator=generator)
        self.gradient = torch.randn(self.hidden.shape, generator=generator)

    def steps(self, *, with_experts: bool) -> dict[str, Step]:
        """A step of each dispatcher; all ranks start it and end it together."""
        return {name: self._step(name, with_experts=with_experts) for name in self.dispatchers}

    def check(self) -> None:
        """Compare outputs and gradients of the two.

        Raises:
            ValueError: they differ; no time would mean anything.
        """
        answers = {name: self._answer(name) for name in self.dispatchers}
        for key, want in answers[STOCK].items():
            deviation = float((answers[DEDUP][key] - want).norm() / want.norm().clamp(min=1e-12))
            if not deviation < TOLERANCE:
                raise ValueError(f"{key} must equal Megatron's to {TOLERANCE:.0e}; it differs by {deviation:.1e}")

    def traffic(self) -> dict[str, Traffic]:
        """What each dispatcher sends, counted at the collective."""
        return {name: _count(self._step(name, with_experts=False)) for name in self.dispatchers}

    def _step(self, name: str, *, with_experts: bool) -> Step:
        def forward() -> Any:
            dist.barrier()
            tokens = self.hidden.clone().requires_grad_()
            probs = self.probs_TE.clone().requires_grad_()
            self.layer.token_dispatcher = self.dispatchers[name]
            return tokens, probs, self._run(tokens, probs, with_experts=with_experts)

        def backward(state: Any) -> None:
            state[2].backward(self.gradient)
            self.layer.zero_grad(set_to_none=True)
            dist.barrier()

        return Step(forward=forward, backward=backward)

    def _run(self, tokens: Tensor, probs_TE: Tensor, *, with_experts: bool) -> Tensor:
        layer, dispatcher = self.layer, self.layer.token_dispatcher
        hidden, probs = layer.preprocess(tokens, probs_TE, self.routing_map_TE)
        hidden, probs = layer.dispatch(hidden, probs)
        if with_experts:
            output, _ = layer.routed_experts_compute(hidden, probs)
        else:
            rows, _, row_probs = dispatcher.dispatch_postprocess(hidden, probs)
            output = dispatcher.combine_preprocess(rows * row_probs[:, None])
        return layer.postprocess(layer.combine(output), None)

    def _answer(self, name: str) -> dict[str, Tensor]:
        step = self._step(name, with_experts=True)
        tokens, probs, output = step.forward()
        output.backward(self.gradient)
        found = {"output": output.detach(), "tokens' gradient": tokens.grad}
        # Megatron's leaves gradients where nothing was routed unset or zero alike
        found["probabilities' gradient"] = probs.grad * self.routing_map_TE
        found |= {f"gradient of {n}": p.grad for n, p in self.layer.experts.named_parameters()}
        self.layer.zero_grad(set_to_none=True)
        return found


def uniform_routing(size: DispatchSize, *, generator: torch.Generator) -> Tensor:
    """[T, E] bool: every token's experts, any as likely as another."""
    shape = (size.tokens, size.experts)
    chosen_TK = torch.rand(shape, generator=generator).topk(size.top_k).indices
    return torch.zeros(shape, dtype=torch.bool).scatter_(1, chosen_TK, True)


def _count(step: Step) -> Traffic:
    rows, crossing = [], 0
    original: Callable[..., Any] = dist.all_to_all_single

    def counted(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal crossing
        splits = kwargs.get("input_split_sizes")
        own = int(splits[dist.get_rank()])
        row_bytes = input[0].numel() * input.element_size() if len(input) else 0
        crossing += (len(input) - own) * row_bytes
        if input.dim() == 2:
            rows.append(len(input))
        return original(output, input, *args, **kwargs)

    dist.all_to_all_single = counted
    try:
        step.forward()
    finally:
        dist.all_to_all_single = original
    return Traffic(rows=rows[0], crossing_bytes=crossing)


def _build(size: DispatchSize) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.model_dim,
        num_attention_heads=8,
        num_moe_experts=size.experts,
        moe_router_topk=size.top_k,
        moe_ffn_hidden_size=size.ffn_dim,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=dist.get_world_size(),
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_cpu_initialization=os.environ["EMO_DEVICE"] == "cpu",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(num_experts=size.experts, moe_grouped_gemm=False)
    layer = spec.submodules.mlp(config=config, pg_collection=_groups())
    layer.set_layer_number(1)
    return layer


def _dedup(layer: Any) -> Any:
    from emo_megatron.mcore.dispatcher import PoolAlltoAllDispatcher

    return PoolAlltoAllDispatcher(layer.num_local_experts, config=layer.config, pg_collection=_groups())


def _groups() -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    return get_default_pg_collection()
