"""Recipes of Megatron-Bridge made small enough for a CPU; whatever of a recipe is not size stays.

Importing this module imports Bridge, from the folder that comes first on PYTHONPATH (tests/bridge/conftest.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emo_megatron.mcore import cpu

cpu.activate()

from support.bridge_stand_ins import stand_ins  # noqa: E402

with stand_ins():
    import megatron.bridge.recipes
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.pretrain  # noqa: F401

import torch  # noqa: E402
from megatron.bridge.models.gpt_provider import local_layer_spec  # noqa: E402

VOCAB = 512

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "moe_ffn_hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 16,
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "vocab_size": VOCAB,
    "seq_length": 64,
    "expert_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_layout": None,
}
WITHOUT_GPU: dict[str, Any] = {
    "transformer_impl": "local",
    "attention_backend": None,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "use_cpu_initialization": True,
    "perform_initialization": True,
    "pipeline_dtype": torch.float32,
    "autocast_dtype": None,
    "params_dtype": torch.float32,
    "bf16": False,
}


def shrink(cfg: Any, folder: Path, *, steps: int, **model: Any) -> Any:
    """The recipe with a small model and no part of a GPU, saving its checkpoint into `folder`."""
    for name, value in (SIZES | WITHOUT_GPU | model).items():
        setattr(cfg.model, name, value)
    cfg.model.transformer_layer_spec = model.get("transformer_layer_spec", local_layer_spec)
    cfg.mixed_precision = cfg.comm_overlap = None
    _set(cfg.dist, distributed_backend="gloo")
    _set(cfg.tokenizer, tokenizer_type="NullTokenizer", vocab_size=VOCAB)
    _set(cfg.dataset, seq_length=cfg.model.seq_length, num_workers=0, pin_memory=False)
    _set(cfg.train, train_iters=steps, global_batch_size=8, micro_batch_size=2, manual_gc=False)
    _set(cfg.validation, eval_interval=1000, eval_iters=0)
    _set(cfg.scheduler, lr_warmup_iters=0, lr_decay_iters=steps)
    _set(cfg.optimizer, lr=3e-3, min_lr=1e-4, bf16=False, params_dtype=torch.float32)
    _set(cfg.optimizer, use_precision_aware_optimizer=False, use_distributed_optimizer=False)
    for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(cfg.optimizer, name, torch.float32)
    _set(cfg.ddp, use_distributed_optimizer=False, overlap_grad_reduce=False)
    _set(cfg.ddp, overlap_param_gather=False, average_in_collective=False)
    _set(cfg.logger, log_interval=1, tensorboard_dir=None)
    _set(cfg.checkpoint, save=str(folder), load=str(folder), save_interval=steps)
    return cfg


def _set(section: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(section, name, value)


def from_folder(folder: str) -> Any:
    """The provider that AutoBridge makes of a Hugging Face folder, without the parts of a GPU."""
    from megatron.bridge import AutoBridge

    import emo_megatron.bridge  # noqa: F401  registers the formats

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    for name, value in WITHOUT_GPU.items():
        # a model that is loaded is not initialized
        if name != "perform_initialization":
            setattr(provider, name, value)
    provider.seq_length = SIZES["seq_length"]
    return provider
