"""The models that bench_model.py trains: Megatron's GPT with its own MoE layers and with pools, on the same weights.

All contenders share one set of weights, gradients and optimizer states, and train them in turns. So contenders differ
only in their routers, and the additional memory of a contender is its activations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layers import start_megatron
from timing import Step
from torch import Tensor

from emo_megatron.config import PoolConfig

STANDARD = "standard MoE"
ALL_EXPERTS = "EMO, pools of all experts"
EMO = "EMO, pools of top-k to all experts"
METRICS_OFF = ", metrics off"
LEARNING_RATE = 1e-6
"""Small, so that the load of the experts stays what it is at the start. The work does not depend on it."""
NUM_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Everything that says how much work a step is."""

    layers: int
    model_dim: int
    heads: int
    experts: int
    top_k: int
    ffn_dim: int
    vocab: int
    seq_length: int
    rows: int
    document_tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} must be at least 1; got {getattr(self, field.name)}"
                )
        if not self.top_k < self.experts:
            raise ValueError(f"--top-k must be below --experts ({self.experts}); got {self.top_k}")
        if self.model_dim % self.heads:
            raise ValueError(f"--model-dim must be a multiple of --heads ({self.heads}); got {self.model_dim}")
        if self.document_tokens > self.seq_length:
            raise ValueError(
                f"--document-tokens must be at most --seq-length ({self.seq_length}); got {self.document_tokens}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a step, which is one micro-batch."""
        return self.rows * self.seq_length

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, d={self.model_dim}, {self.heads} heads, E={self.experts} + 1 shared, "
            f"K={self.top_k}, ffn={self.ffn_dim}, vocabulary {self.vocab}, "
            f"{self.rows} x {self.seq_length} tokens per step in documents of {self.document_tokens} on average"
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed micro-batch."""

    tokens: dict[str, Tensor]
    """[1, T] each, as GPTModel takes them."""
    bounds: Tensor
    """[D + 1] int32; no document crosses a row."""
    longest: int
    """Tokens of the longest document."""
    seq_length: int

    def packed(self) -> Any:
        """The boundaries as a fresh object, on which every layer of one forward pass leaves what it made of them."""
        from megatron.core.packed_seq_params import PackedSeqParams

        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.bounds,
            cu_seqlens_kv=self.bounds,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
            tokens_per_sample=self.seq_length,
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """One set of weights with its optimizer, and a model around it for each contender."""

    models: dict[str, Any]
    trackers: dict[str, Any]
    """Contender -> Megatron's MoE metrics tracker while its turn lasts."""
    distributed: Any
    """Megatron's DistributedDataParallel, around the model whose turn it is."""
    optimizer: Any
    batches: Sequence[Batch]
    num_layers: int

    def steps(self) -> dict[str, Step]:
        """A training step of every contender; all see the same batches in the same order."""
        return {name: self._step(name) for name in self.models}

    def loss(self, name: str, index: int) -> Tensor:
        """[], of the batch with this index; gradients are zero and it is this contender's turn afterwards."""
        from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

        from emo_megatron.mcore.context import CLOCK

        batch = self.batches[index % len(self.batches)]
        CLOCK.consumed_samples = index * (batch.tokens["labels"].numel() // batch.seq_length)
        set_moe_metrics_tracker(self.trackers[name])
        self.distributed.module = self.models[name]
        self.distributed.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses_1T: Tensor = self.distributed(**batch.tokens, attention_mask=None, packed_seq_params=batch.packed())
        return losses_1T.mean()

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients in `main_grad` of the weights."""
        from megatron.core.distributed import finalize_model_grads

        loss.backward()
        finalize_model_grads([self.distributed])

    def _step(self, name: str) -> Step:
        indices = itertools.count()
        tracker = self.trackers[name]

        def finish(loss: Tensor) -> None:
            self.backward(loss)
            self.optimizer.step()
            if not name.endswith(METRICS_OFF):
                tracker.report(loss_scale=1.0, iteration=0, num_layers=self.num_layers)

        return Step(forward=lambda: self.loss(name, next(indices)), backward=finish)


def build_training(size: ModelSize, *, device: torch.device, dispatcher: str) -> Training:
    """Start Megatron in this process, one rank, and build the contenders, bf16 with fp32 main weights.

    Args:
        size: of the model and its batches.
        device: of all.
        dispatcher: PoolConfig.pool_dispatcher of the models with pools.
    """
    start_megatron(device)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = _config(size, on_gpu=device.type == "cuda")
    pools = {
        STANDARD: None,
        STANDARD + METRICS_OFF: None,
        ALL_EXPERTS: PoolConfig(pool_min=size.experts, pool_dispatcher=dispatcher),
        EMO: PoolConfig(pool_min=size.top_k, pool_dispatcher=dispatcher),
        EMO + METRICS_OFF: PoolConfig(pool_min=size.top_k, pool_dispatcher=dispatcher),
    }
    models: dict[str, Any] = {}
    for name, pool in pools.items():
        model = _model(config, size, pool).to(device)
        models[name] = Float16Module(config, model)
        _share_weights(models[name], models[STANDARD])
    distributed = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), models[STANDARD]
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, weight_decay=0.1, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16
        ),
        [distributed],
        use_gloo_process_groups=False,
    )
    return Training(
        models=models,
        trackers={name: _tracker(name, pool, config) for name, pool in pools.items()},
        distributed=distributed,
        optimizer=optimizer,
        batches=batches_of(size, device),
        num_layers=size.layers,
    )


def _config(size: ModelSize, *, on_gpu: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.model_dim,
        ffn_hidden_size=size.ffn_dim,
        num_attention_heads=size.heads,
        num_moe_experts=size.experts,
        moe_router_topk=size.top_k,
        moe_router_pre_softmax=True,
        moe_ffn_hidden_size=size.ffn_dim,
        moe_shared_expert_intermediate_size=size.ffn_dim,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_z_loss_coeff=0.001,
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not on_gpu,
        transformer_impl="local",
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _model(config: Any, size: ModelSize, pool: PoolConfig | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from emo_megatron.mcore.spec import pool_block_spec

    spec = pool_block_spec(config, pool=pool or PoolConfig())
    if pool is None:
        stock = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        spec = _with_attention_of(stock, spec)
    # not rotary: without Transformer Engine it goes through the documents one by one, launches that hide all others
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=size.vocab,
        max_sequence_length=size.seq_length,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
    )


def _with_attention_of(stock: Any, pooled: Any) -> Any:
    """Megatron's own layers with the attention and norms of the layers with pools, which keep to documents."""
    layers = [
        dataclasses.replace(
            own,
            submodules=dataclasses.replace(
                own.submodules,
                input_layernorm=other.submodules.input_layernorm,
                pre_mlp_layernorm=other.submodules.pre_mlp_layernorm,
                self_attention=other.submodules.self_attention,
            ),
        )
        for own, other in zip(stock.layer_specs, pooled.layer_specs, strict=True)
    ]
    return dataclasses.replace(stock, layer_specs=layers, layer_norm=pooled.layer_norm)


def _share_weights(model: Any, like: Any) -> None:
    """Put the parameters of `like`, a model of the same names, into this one."""
    others = dict(like.named_modules())
    for name, module in model.named_modules():
        for weight in list(module._parameters):
            module._parameters[weight] = others[name]._parameters[weight]


def _tracker(name: str, pool: PoolConfig | None, config: Any) -> Any:
    """What Megatron would have the routers record into; one that keeps nothing for contenders without metrics."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, get_moe_metrics_tracker

    from emo_megatron.mcore.metrics import install_metrics

    class KeepsNothing(MoEMetricsTracker):
        def record(self, *args: Any, **kwargs: Any) -> None:
            pass

    if name.endswith(METRICS_OFF):
        return KeepsNothing()
    if pool is None:
        return MoEMetricsTracker()
    install_metrics(pool, config, has_documents=True)
    return get_moe_metrics_tracker()


def batches_of(size: ModelSize, device: torch.device) -> list[Batch]:
    """The micro-batches that every contender goes through again and again."""
    return [_batch(size, device, seed) for seed in range(NUM_BATCHES)]


def _batch(size: ModelSize, device: torch.device, seed: int) -> Batch:
    """Random tokens in documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    cuts = [torch.tensor([0])]
    for row in range(size.rows):
        documents = max(1, round(size.seq_length / size.document_tokens))
        inner = torch.randperm(size.seq_length - 1, generator=generator)[: documents - 1] + 1
        ends = torch.cat([inner.sort().values, torch.tensor([size.seq_length])])
        cuts.append(row * size.seq_length + ends)
    bounds = torch.cat(cuts).int()
    tokens_1T = torch.randint(size.vocab, (1, size.tokens), generator=generator)
    lengths = bounds.diff()
    starts_1T = bounds[:-1].repeat_interleave(lengths)[None]
    tensors = {
        "input_ids": tokens_1T,
        "labels": tokens_1T.roll(-1, dims=1),
        "position_ids": torch.arange(size.tokens) - starts_1T,
    }
    return Batch(
        tokens={name: tensor.to(device) for name, tensor in tensors.items()},
        bounds=bounds.to(device),
        longest=int(lengths.max()),
        seq_length=size.seq_length,
    )
