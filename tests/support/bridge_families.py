"""One recipe of each family of Megatron-Bridge, made small and trained two steps with pools, for tests."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.models.exaone.exaone_moe import exaone_moe_provider
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from emo_megatron.bridge import apply_pools, pool_forward_step
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.local import local_stack_spec
from emo_megatron.mcore.router_documents import forget
from support import bridge_recipes, hybridep
from support.bridge_coverage import without_transformer_engine

# a stand-in was there when it was imported
exaone_moe_provider.HAVE_TE = False

RECIPES = {
    "OLMoE": "recipes.olmoe_7b_pretrain_8gpu_h100_bf16_config",
    "Qwen3 30B-A3B": "recipes.qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config",
    "Qwen3 235B-A22B": "recipes.qwen3_235b_a22b_pretrain_256gpu_h100_bf16_config",
    "Qwen3-Next": "recipes.qwen3_next_80b_a3b_pretrain_32gpu_h100_bf16_config",
    "Qwen3.5": "recipes.qwen35_text_35b_a3b_pretrain_8gpu_gb200_bf16_config",
    "DeepSeek V2": "recipes.deepseek_v2_pretrain_128gpu_h100_bf16_config",
    "DeepSeek V3": "recipes.deepseek_v3_pretrain_1024gpu_h100_bf16_config",
    "DeepSeek V4": "recipes.deepseek_v4_flash_pretrain_64gpu_gb200_bf16_config",
    "Kimi K2": "recipes.kimi_k2_pretrain_512gpu_h100_bf16_config",
    "Moonlight": "recipes.moonlight_16b_pretrain_8gpu_h100_bf16_config",
    "GLM 4.5, 5": "recipes.glm45_air_106b_pretrain_32gpu_h100_bf16_config",
    "gpt-oss": "recipes.gpt_oss_20b_pretrain_16gpu_h100_bf16_config",
    "Nemotron 3 Nano": "recipes.nemotron_3_nano_pretrain_8gpu_h100_bf16_config",
    "Nemotron 3.5 Lightning": "recipes.nemotron_3_5_lightning_pretrain_8k_config",
    "Nemotron 3 Super, Ultra": "recipes.nemotron_3_super_pretrain_64gpu_gb200_bf16_config",
    "EXAONE": "recipes.exaone_moe_236b_a23b_pretrain_64gpu_h100_bf16_config",
    "MiniMax-M3": "recipes.minimax_m3_pretrain_256gpu_h100_bf16_config",
    "Step-3.5": "recipes.step35_196b_a11b_pretrain_512gpu_h100_bf16_config",
}
"""Family -> the recipe of it that is trained."""

OF_LATENT_ATTENTION = {"kv_lora_rank": 16, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}


RECOMPUTED_ON_GPUS = ("moe_act", "layernorm")
"""Parts that Megatron recomputes with Transformer Engine only."""


def small(cfg: Any, folder: Path) -> tuple[Any, list[str]]:
    """The recipe with small sizes of whatever it has, and its own spec without Transformer Engine.

    Returns:
        The recipe, and what of it is no size and was left out, for it needs a GPU or a package that is not here.
    """
    model, before = cfg.model, {}
    without = {
        "model.moe_token_dispatcher_type": "alltoall",
        "model.recompute_modules": [name for name in model.recompute_modules or () if name not in RECOMPUTED_ON_GPUS],
        "model.layernorm_zero_centered_gamma": False,
        "model.moe_latent_size": None,
        "model.cuda_graph_impl": "none",
        "optimizer.optimizer": "adam",
    }
    for name, value in without.items():
        section, _, field = name.partition(".")
        # None is what nothing of that kind is
        before[name] = getattr(getattr(cfg, section), field) or type(value)()
        setattr(getattr(cfg, section), field, value)
    spec = without_transformer_engine(getattr(model, "transformer_layer_spec", None))
    sizes = _sizes(model) | {"transformer_layer_spec": spec}
    bridge_recipes.shrink(cfg, folder, steps=2, **sizes)
    cfg.checkpoint.save = cfg.checkpoint.load = None
    cfg.checkpoint.async_save = False
    return cfg, [f"{n}: {before[n]!r} -> {without[n]!r}" for n in without if before[n] != without[n]]


def _sizes(model: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "num_moe_experts": 16,
        "moe_flex_dispatcher_backend": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "virtual_pipeline_model_parallel_size": None,
    }
    if model.moe_shared_expert_intermediate_size:
        sizes["moe_shared_expert_intermediate_size"] = 32
    if isinstance(model.moe_layer_freq, list):
        sizes["moe_layer_freq"] = [min(model.moe_layer_freq), 1]
    if isinstance(model.no_rope_freq, list):
        sizes["no_rope_freq"] = [0, 1]
    if (model.moe_router_num_groups or 1) > 1:
        sizes |= {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    if model.window_size is not None:
        sizes["window_size"] = (15, 0)
    if isinstance(model.window_attn_skip_freq, list):
        sizes["window_attn_skip_freq"] = [1, 0]
    if model.multi_latent_attention:
        sizes |= OF_LATENT_ATTENTION | ({"q_lora_rank": 32} if model.q_lora_rank else {})
    if getattr(model, "hybrid_layer_pattern", None):
        sizes |= {"hybrid_layer_pattern": "ME*E", "num_layers": 4}
    return sizes


def train(recipe: Callable[[], Any], *, has_pools: bool, change: Callable[[Any], None] = lambda model: None) -> Any:
    """Trains two steps.

    Args:
        recipe: a function that gives a ConfigContainer.
        has_pools: whether with pools, or as the recipe comes.
        change: of the small model, in place.

    Returns:
        "losses" and mean "pool_sizes" of the steps, and what was "left_out" of the recipe; or the "error" of the host
        or of the pools.
    """
    forget()
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    printed, left_out = io.StringIO(), []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        cfg, left_out = small(recipe(), Path(folder))
        change(cfg.model)
        try:
            if has_pools:
                apply_pools(cfg, PoolConfig(pool_min=4))
            pretrain(cfg, pool_forward_step if has_pools else forward_step)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = {"left_out": left_out}
    for name, pattern in {"losses": r"lm loss: (\S+)", "pool_sizes": r"pool_size: (\S+)"}.items():
        found[name] = [float(number) for number in re.findall(pattern, printed.getvalue())]
    return found


def _without_mamba(model: Any) -> None:
    model.hybrid_layer_pattern, model.hybrid_stack_spec = "*E*E", local_stack_spec


def train_over_budget(recipe: Callable[[], Any]) -> Any:
    """As `train` with pools, where HybridEP may send half of the tokens and Bridge must run every step again.

    Returns:
        Beside what `train` gives, "runs" of the model.
    """
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    def limit(model: Any) -> None:
        model.register_pre_wrap_hook(lambda chunks: [chunk.register_forward_hook(count) for chunk in chunks] and chunks)

        def finalize() -> None:
            type(model).finalize(model)
            # after the check, which asks for a GPU and for Transformer Engine's experts
            model.moe_token_dispatcher_type, model.moe_flex_dispatcher_backend = "flex", "hybridep"
            model.moe_expert_rank_capacity_factor = 0.5

        model.finalize = finalize

    with hybridep.stand_in():
        return train(recipe, has_pools=True, change=limit) | {"runs": runs}


def outcome(recipe: Callable[[], Any]) -> dict[str, Any]:
    """What `train` gives with pools; beside an error, what the stock recipe does, and without Mamba layers."""
    found = train(recipe, has_pools=True)
    if "error" in found:
        found["stock"] = train(recipe, has_pools=False)
        if "MambaSSM" in found["error"]:
            found["without_mamba"] = train(recipe, has_pools=True, change=_without_mamba)
    return found
