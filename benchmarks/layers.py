"""The MoE layers that bench_layer.py times: Megatron's own layer, and this package's layers with the same weights.

T tokens, H width of the model, E routed experts, D documents.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from experts import GROUPED, SEQUENTIAL, TE_EXPERTS, GroupedExperts
from timing import Step
from torch import Tensor

from emo_megatron.config import PoolConfig

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
            raise ValueError(f"--top-k must be at least 1 and below --experts ({self.experts}); got {self.top_k}")
        if not 1 <= self.documents <= self.tokens:
            raise ValueError(
                f"--documents must be at least 1 and at most --tokens ({self.tokens}); got {self.documents}"
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
    packed: Any
    """PackedSeqParams of the micro-batch, as the layers of a model get it."""
    expert_kind: str
    """Which module the experts are."""
    steps: Iterator[int]
    """Counts micro-batches: every scope draws other pools."""

    def new_scope(self, micro_batch: int | None = None) -> Any:
        """What PoolRouter must know about one micro-batch, the next one if not said, with no pools chosen yet."""
        from emo_megatron.mcore.context import CLOCK, Shard, scope_of

        CLOCK.consumed_samples = next(self.steps) if micro_batch is None else micro_batch
        shard = Shard(tp_rank=0, tp_size=1, cp_rank=0, cp_size=1, dp_rank=0, dp_size=1, microbatch=0)
        return scope_of(
            self.packed,
            hidden_shape=self.hidden_T1H.shape,
            shard=shard,
            pool=self.layers[POOLS].router.pool,
            layer_number=LAYER_NUMBER,
        )

    def layer_steps(self) -> dict[str, Step]:
        """Every layer, forward and backward to its input and weights; with pools from the document boundaries on.

        A model makes the scope once per micro-batch for all layers, so the cost per layer is a little lower.
        """
        return {
            name: self.step(layer, router_only=False, get_scope=self.new_scope) for name, layer in self.layers.items()
        }

    def router_steps(self, *, is_first_layer: bool = False) -> dict[str, Step]:
        """Every layer's router alone; the first layer of a micro-batch makes the scope and draws the sizes of all."""
        scope = self.new_scope()

        def used_scope() -> Any:
            scope.pools.clear()
            scope.counts.clear()
            return scope

        get_scope = self.new_scope if is_first_layer else used_scope
        return {name: self.step(layer, router_only=True, get_scope=get_scope) for name, layer in self.layers.items()}

    def step(self, layer: Any, *, router_only: bool, get_scope: Callable[[], Any]) -> Step:
        """Forward and backward of a layer or its router; gradients come back in the order of the parameters."""
        weights = list(layer.router.parameters() if router_only else layer.parameters())
        has_pools = layer is not self.layers[STOCK]

        def forward() -> tuple[Tensor, Tensor]:
            hidden_T1H = self.hidden_T1H.detach().requires_grad_()
            layer.router.reset_global_aux_loss_tracker()
            if has_pools:
                (layer.router if router_only else layer).scope = get_scope()
            out = layer.router(hidden_T1H) if router_only else layer(hidden_T1H)
            return hidden_T1H, out[0]

        def backward(state: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            hidden_T1H, out = state
            upstream = self.upstream_T1H
            if router_only:
                upstream = upstream[:, 0, : out.shape[1]].to(out.dtype)
            return torch.autograd.grad([out], [hidden_T1H, *weights], [upstream], allow_unused=True)

        return Step(forward=forward, backward=backward)


def build_layers(size: LayerSize, *, device: torch.device) -> list[Layers]:
    """Start Megatron in this process, one rank, and build the layers and a random packed micro-batch.

    Returns:
        Transformer Engine's grouped experts where a GPU has them; else SequentialMLP's, then the same weights over
        grouped_mm. Everything but the experts is equal, weights included.
    """
    uses_te = start_megatron(device)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from emo_megatron.mcore.metrics import install_metrics
    from emo_megatron.mcore.spec import pool_block_spec

    config = _config(size, on_gpu=device.type == "cuda", uses_te=uses_te)
    pools = {SAME_CHOICES: PoolConfig(pool_min=size.experts), POOLS: PoolConfig(pool_min=size.top_k)}
    install_metrics(pools[POOLS], config, has_documents=True)
    stock_spec = get_gpt_decoder_block_spec(config, use_transformer_engine=uses_te, normalization="RMSNorm")
    specs = {STOCK: stock_spec}
    specs |= {name: pool_block_spec(config, pool=pool) for name, pool in pools.items()}
    mlps = {name: spec.layer_specs[0].submodules.mlp for name, spec in specs.items()}
    first = _build_all(mlps, config, device)
    kind = TE_EXPERTS if uses_te else SEQUENTIAL
    found = [_with_batch(first, size, config.params_dtype, device, expert_kind=kind)]
    if not uses_te:
        second = _build_all(mlps, config, device, like=first[STOCK])
        experts = GroupedExperts(first[STOCK].experts)
        for layer in second.values():
            layer.experts = experts
        found.append(dataclasses.replace(found[0], layers=second, expert_kind=GROUPED))
    return found


def start_megatron(device: torch.device) -> bool:
    """Make this process Megatron's only rank, on this device; returns whether Transformer Engine can be used."""
    from emo_megatron.mcore import cpu

    os.environ["EMO_DEVICE"] = device.type
    cpu.activate()
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    on_gpu = device.type == "cuda"
    store = dist.FileStore(str(Path(_meeting_place().name) / "store"), 1)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)
    # a group over gloo would look for a network, which the one rank does not need
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones((), device=device)
    return on_gpu and HAVE_TE


@cache
def _meeting_place() -> tempfile.TemporaryDirectory[str]:
    """Kept for the life of the process: NCCL meets at its first collective."""
    return tempfile.TemporaryDirectory()


def _build_all(mlps: dict[str, Any], config: Any, device: torch.device, *, like: Any = None) -> dict[str, Any]:
    """One layer of each spec, all with the weights of `like`, or else of the first."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers: dict[str, Any] = {}
    for name, build in mlps.items():
        layer = build(config=config, layer_number=LAYER_NUMBER, pg_collection=groups).to(device)
        layer.set_layer_number(LAYER_NUMBER)
        like = like or layer
        layer.experts = like.experts
        layer.router.weight = like.router.weight
        layers[name] = layer
    return layers


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
    layers: dict[str, Any], size: LayerSize, dtype: torch.dtype, device: torch.device, *, expert_kind: str
) -> Layers:
    from megatron.core.packed_seq_params import PackedSeqParams

    generator = torch.Generator().manual_seed(2)
    shape = (size.tokens, 1, size.model_dim)
    hidden, upstream = (torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    cuts = torch.randperm(size.tokens - 1, generator=generator)[: size.documents - 1] + 1
    bounds = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([size.tokens])])
    bounds = bounds.int().to(device)
    return Layers(
        layers=layers,
        expert_kind=expert_kind,
        hidden_T1H=hidden,
        upstream_T1H=upstream,
        packed=PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds),
        steps=itertools.count(),
    )
