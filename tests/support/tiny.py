"""A tiny GPTModel with pool layers, built and trained inside a rank (tests/support/ranks.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

VOCAB = 64
SEQ = 16
ROWS = 2
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "qk_layernorm": True,
    "rope_type": "rope",
    "apply_rope_fusion": False,
}
"""Multi-latent attention, both latents with a norm."""


def setup(**sizes: int) -> None:
    """Megatron's groups and random states for this layout; keys as initialize_model_parallel takes them."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**sizes)
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)


def transformer_config(**overrides: Any) -> Any:
    """TransformerConfig of two MoE layers with 8 routed experts, top-2 and a shared expert.

    `multi_latent_attention=True` gives MLATransformerConfig, with latents and heads of a few features.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.05,
        "moe_z_loss_coeff": 0.001,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "transformer_impl": "local",
        "pipeline_dtype": torch.float32,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": parallel_state.get_tensor_model_parallel_world_size() > 1,
    }
    if overrides.get("multi_latent_attention"):
        return MLATransformerConfig(**(options | LATENT | overrides))
    return TransformerConfig(**(options | overrides))


def model(pool: Any = None, *, positions: str = "rope", **overrides: Any) -> Any:
    """A GPTModel on this pipeline stage; `pool` None gives Megatron's stock local spec."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from emo_megatron.mcore.spec import pool_block_spec, with_pools

    config = transformer_config(**overrides)
    local, stock, mtp = {"use_transformer_engine": False}, None, None
    if pool is None or config.mtp_num_layers:
        stock = get_gpt_decoder_block_spec(config, **local, normalization="RMSNorm")
    if config.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, stock, **local)
        # None on pipeline stages without prediction
        mtp = mtp if None in (pool, mtp) else with_pools(mtp, config=config, pool=pool)
    return GPTModel(
        config=config,
        transformer_layer_spec=stock if pool is None else pool_block_spec(config, pool=pool),
        mtp_block_spec=mtp,
        vocab_size=VOCAB,
        max_sequence_length=SEQ * ROWS,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def router(pool: Any = None, **overrides: Any) -> Any:
    """A PoolRouter of the first layer; `pool` None gives Megatron's own."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter

    from emo_megatron.mcore.router import PoolRouter

    options = {"config": transformer_config(**overrides)}
    options["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    made = TopKRouter(**options) if pool is None else PoolRouter(**options, pool=pool)
    made.set_layer_number(1)
    return made


def shard(**ranks: int) -> Any:
    """Of the only rank, or of those given, and of the first micro-batch."""
    from emo_megatron.mcore.context import Shard

    alone = dict.fromkeys(("tp_rank", "cp_rank", "dp_rank", "microbatch"), 0)
    return Shard(**alone | dict.fromkeys(("tp_size", "cp_size", "dp_size"), 1) | ranks)


def scope(packed: Any, pool: Any, *, tokens: int = SEQ * ROWS, layer: int = 1, **ranks: int) -> Any:
    """The scope of a packed micro-batch, of which this rank has so many tokens."""
    from emo_megatron.mcore.context import scope_of

    shape = torch.Size((tokens, 1, 32))
    return scope_of(packed, hidden_shape=shape, shard=shard(**ranks), pool=pool, layer_number=layer)


def packed(cu_seqlens: list[int], *, num_padding: list[int] | None = None, **overrides: Any) -> Any:
    """PackedSeqParams of these document boundaries, with what this version's takes, and the samples' padding."""
    import dataclasses

    from megatron.core.packed_seq_params import PackedSeqParams

    from emo_megatron.mcore.padding import PACKING, Packing

    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    longest = int(bounds.diff().max())
    options: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": bounds,
        "cu_seqlens_kv": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "tokens_per_sample": SEQ,
    }
    known = {field.name for field in dataclasses.fields(PackedSeqParams)}
    made = PackedSeqParams(**{k: v for k, v in (options | overrides).items() if k in known})
    if num_padding is not None:
        padding_B = torch.tensor(num_padding)
        packing = Packing(cu_seqlens=bounds, tokens_per_sample=made.tokens_per_sample, num_padding_B=padding_B)
        setattr(made, PACKING, packing)
    return made


def batch(seed: int, *, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Random tokens, labels and positions of a packed micro-batch, [1, rows * SEQ]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (1, rows * SEQ), generator=generator)
    return {
        "input_ids": tokens,
        "labels": tokens.roll(-1, dims=1),
        "position_ids": torch.arange(SEQ).repeat(rows)[None],
    }


def validation_samples(prefix: Path, cache: Path, *, masking: bool = True) -> list[Any]:
    """The validation samples of a dataset, 24 tokens each, the last one short, and a whole sample of padding.

    With `masking` they have Megatron's boundaries, without it those for routers only.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from emo_megatron.mcore.batches import PoolDatasetConfig, PoolGPTDataset

    setup()
    config = PoolDatasetConfig(
        random_seed=1,
        sequence_length=24,
        blend=([str(prefix)], None),
        split="0,100,0",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(eod=1, pad=2, vocab_size=512, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=False,
        inter_document_masking=masking,
        gives_router_bounds=not masking,
    )
    _, valid, _ = BlendedMegatronDatasetBuilder(PoolGPTDataset, [0, None, 0], lambda: True, config).build()
    return [valid[index] for index in range(len(valid))] + [valid[None]]
