"""The MoE layers that bench_layer.py times: Megatron's own, and ours on the same weights.

T tokens, H width of the model, E routed experts, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timing import Step
from torch import Tensor

from emo_megatron.config import PoolConfig
from emo_megatron.documents import DocumentSegments

STOCK = "standard router"
SAME_CHOICES = "pools of all experts"
POOLS = "pools of top-k to all experts"
LAYER_NUMBER = 1


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Everything that says how much work a step is."""

    tokens: int
    model_dim: int
    experts: int
    ffn_dim: int
    top_k: int
    documents: int

    def __post_init__(self) -> None:
        if not 1 <= self.top_k < self.experts:
            raise ValueError(
                f"--top-k must lie in [1, experts), experts being {self.experts}; got {self.top_k}"
            )
        if not 1 <= self.documents <= self.tokens:
            raise ValueError(
                f"--documents must lie in [1, tokens], tokens being {self.tokens}; got {self.documents}"
            )

    def __str__(self) -> str:
        return (
            f"T={self.tokens} d={self.model_dim} E={self.experts} ffn={self.ffn_dim} "
            f"K={self.top_k}, {self.documents} documents"
        )


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers and their input."""

    layers: dict[str, Any]
    hidden_T1H: Tensor
    upstream_T1H: Tensor
    bounds: Tensor
    """[D + 1] int32, where documents start, and T."""
    steps: Iterator[int]
    """Counts micro-batches: every one draws other pools."""

    def new_scope(self) -> Any:
        """What PoolRouter must know about one micro-batch, with no pools chosen yet."""
        from emo_megatron.mcore.context import PoolScope

        num_tokens = self.hidden_T1H.shape[0]
        segments = DocumentSegments.from_cu_seqlens(self.bounds, num_tokens=num_tokens)
        consumed = next(self.steps)
        return PoolScope(
            segments=segments,
            document_ids_T=segments.document_ids_T,
            sample_positions_D=segments.rows_D + consumed,
            consumed_samples=consumed,
        )

    def layer_steps(self) -> dict[str, Step]:
        """Every layer, forward and backward to its input and weights."""
        return {name: self._step(layer, router_only=False) for name, layer in self.layers.items()}

    def router_steps(self) -> dict[str, Step]:
        """Every layer's router alone."""
        return {name: self._step(layer, router_only=True) for name, layer in self.layers.items()}

    def _step(self, layer: Any, *, router_only: bool) -> Step:
        weights = list(layer.router.parameters() if router_only else layer.parameters())
        # one a micro-batch and not one a layer, so it is not this layer's cost
        scope = self.new_scope()

        def forward() -> tuple[Tensor, Tensor]:
            hidden_T1H = self.hidden_T1H.detach().requires_grad_()
            scope.pools.clear()
            scope.counts.clear()
            layer.router.reset_global_aux_loss_tracker()
            if not router_only:
                layer.scope = scope
                return hidden_T1H, layer(hidden_T1H)[0]
            layer.router.scope = scope
            return hidden_T1H, layer.router(hidden_T1H)[0]

        def backward(state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            hidden_T1H, out = state
            upstream = self.upstream_T1H
            if router_only:
                upstream = upstream[:, 0, : out.shape[1]].to(out.dtype)
            return torch.autograd.grad([out], [hidden_T1H, *weights], [upstream], allow_unused=True)

        return Step(forward=forward, backward=backward)

    def check(self) -> None:
        """Compare the layer that pools everything with the standard one, and look whether pools bind.

        Raises:
            ValueError: they differ, or a token left its document's pool: there is nothing to time.
        """
        steps = self.layer_steps()
        results = {}
        for name in (STOCK, SAME_CHOICES):
            state = steps[name].forward()
            gradients = steps[name].backward(state)
            results[name] = [("output", state[1]), ("gradient of the input", gradients[0])]
            # a layer names its router's weight first
            results[name].append(("gradient of the router", gradients[1]))
        tolerance = 1e-4 if self.hidden_T1H.dtype == torch.float32 else 3e-2
        for (what, want), (_, got) in zip(results[STOCK], results[SAME_CHOICES], strict=True):
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error < tolerance:  # NaN is not below
                raise ValueError(
                    f"the layer with pools of all experts does not compute what the standard layer does, so "
                    f"nothing is reported: its {what} differs by {error:.1e} of the largest"
                )
        layer, scope = self.layers[POOLS], self.new_scope()
        layer.router.scope = scope
        _, routing_map_TE = layer.router(self.hidden_T1H)
        if (routing_map_TE & ~scope.pools[LAYER_NUMBER][scope.document_ids_T]).any():
            raise ValueError("tokens leave the pool of their document, so nothing is reported")


def build_layers(size: LayerSize, *, device: torch.device) -> Layers:
    """Start Megatron in this process, one rank, and build the layers and a random packed micro-batch."""
    from emo_megatron.mcore import cpu

    cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from emo_megatron.mcore.metrics import install_metrics
    from emo_megatron.mcore.spec import pool_block_spec

    on_gpu = device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones((), device=device)

    config = _config(size, on_gpu=on_gpu, uses_te=on_gpu and HAVE_TE)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    pools = {
        SAME_CHOICES: PoolConfig(pool_min=size.experts),
        POOLS: PoolConfig(pool_min=size.top_k),
    }
    install_metrics(pools[POOLS], config, has_documents=True)
    stock_spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=on_gpu and HAVE_TE, normalization="RMSNorm"
    )
    specs = {STOCK: stock_spec}
    specs |= {name: pool_block_spec(config, pool=pool) for name, pool in pools.items()}
    layers: dict[str, Any] = {}
    for name, spec in specs.items():
        build = spec.layer_specs[0].submodules.mlp
        layer = build(config=config, layer_number=LAYER_NUMBER, pg_collection=groups).to(device)
        layer.set_layer_number(LAYER_NUMBER)
        if name != STOCK:
            layer.experts = layers[STOCK].experts
            layer.router.weight = layers[STOCK].router.weight
        layers[name] = layer
    return _with_batch(layers, size, config.params_dtype, device)


def _config(size: LayerSize, *, on_gpu: bool, uses_te: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    precision = {"bf16": True, "params_dtype": torch.bfloat16} if on_gpu else {}
    return TransformerConfig(
        num_layers=1,
        hidden_size=size.model_dim,
        ffn_hidden_size=size.ffn_dim,
        num_attention_heads=size.model_dim // 64 or 1,
        num_moe_experts=size.experts,
        moe_router_topk=size.top_k,
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=size.ffn_dim,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.001,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=uses_te,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not on_gpu,
        transformer_impl="transformer_engine" if uses_te else "local",
        pipeline_dtype=torch.bfloat16 if on_gpu else torch.float32,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **precision,
    )


def _with_batch(
    layers: dict[str, Any], size: LayerSize, dtype: torch.dtype, device: torch.device
) -> Layers:
    generator = torch.Generator().manual_seed(2)
    shape = (size.tokens, 1, size.model_dim)
    hidden, upstream = (
        torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2)
    )
    cuts = torch.randperm(size.tokens - 1, generator=generator)[: size.documents - 1] + 1
    bounds = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([size.tokens])])
    return Layers(
        layers=layers,
        hidden_T1H=hidden,
        upstream_T1H=upstream,
        bounds=bounds.int().to(device),
        steps=itertools.count(),
    )
