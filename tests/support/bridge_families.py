"""One recipe of each family of Megatron-Bridge, made small and trained two steps with pools; prints JSON.

    python tests/support/bridge_families.py FAMILY...

For each family: the losses, or what the run with pools and the stock recipe each raise.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import bridge_coverage, bridge_recipes, hub_configs

from megatron.bridge.models.exaone.exaone_moe import exaone_moe_provider
from megatron.bridge.models.gpt_provider import default_layer_spec, local_layer_spec
from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from emo_megatron.bridge import apply_pools, pool_forward_step
from emo_megatron.config import PoolConfig
from emo_megatron.mcore.router_documents import forget

RECIPES = {
    "OLMoE": "olmoe_7b_pretrain_8gpu_h100_bf16_config",
    "Qwen3 30B-A3B": "qwen3_30b_a3b_pretrain_8gpu_h100_bf16_config",
    "Qwen3 235B-A22B": "qwen3_235b_a22b_pretrain_256gpu_h100_bf16_config",
    "Qwen3-Next": "qwen3_next_80b_a3b_pretrain_32gpu_h100_bf16_config",
    "Qwen3.5": "qwen35_text_35b_a3b_pretrain_8gpu_gb200_bf16_config",
    "DeepSeek V2": "deepseek_v2_pretrain_128gpu_h100_bf16_config",
    "DeepSeek V3": "deepseek_v3_pretrain_1024gpu_h100_bf16_config",
    "DeepSeek V4": "deepseek_v4_flash_pretrain_64gpu_gb200_bf16_config",
    "Kimi K2": "kimi_k2_pretrain_512gpu_h100_bf16_config",
    "Moonlight": "moonlight_16b_pretrain_8gpu_h100_bf16_config",
    "GLM 4.5, 5": "glm45_air_106b_pretrain_32gpu_h100_bf16_config",
    "gpt-oss": "gpt_oss_20b_pretrain_16gpu_h100_bf16_config",
    "Nemotron 3 Nano": "nemotron_3_nano_pretrain_8gpu_h100_bf16_config",
    "Nemotron 3.5 Lightning": "nemotron_3_5_lightning_pretrain_8k_config",
    "Nemotron 3 Super, Ultra": "nemotron_3_super_pretrain_64gpu_h100_bf16_config",
    "EXAONE": "exaone_moe_236b_a23b_pretrain_64gpu_h100_bf16_config",
    "MiniMax-M3": "minimax_m3_pretrain_256gpu_h100_bf16_config",
    "Step-3.5": "step35_196b_a11b_pretrain_512gpu_h100_bf16_config",
}
"""Family -> the recipe of it that is trained."""

OF_LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
}


def small(cfg: Any, folder: Path) -> Any:
    """The recipe with small sizes of whatever it has, and its own spec without Transformer Engine."""
    model = cfg.model
    sizes: dict[str, Any] = {
        "num_moe_experts": 16,
        "moe_token_dispatcher_type": "alltoall",  # flex is DeepEP or HybridEP, for GPUs
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
    if (model.moe_router_num_groups or 1) > 1:
        sizes |= {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    if model.window_size is not None:
        sizes["window_size"] = (15, 0)
    if isinstance(model.window_attn_skip_freq, list):
        sizes["window_attn_skip_freq"] = [1, 0]
    if model.multi_latent_attention:
        sizes |= OF_LATENT_ATTENTION | ({"q_lora_rank": 32} if model.q_lora_rank else {})
    spec = without_transformer_engine(getattr(model, "transformer_layer_spec", None))
    return bridge_recipes.shrink(cfg, folder, steps=2, transformer_layer_spec=spec, **sizes)


def without_transformer_engine(spec: Any) -> Any:
    """The function that builds a recipe's layers, asked for Megatron's local ones where it can build them."""
    if spec is default_layer_spec:
        return local_layer_spec
    if spec is olmoe_layer_spec:
        return _local_olmoe_layer_spec
    if isinstance(spec, functools.partial) and "use_transformer_engine" in spec.keywords:
        return functools.partial(spec, use_transformer_engine=False)
    return spec


def _local_olmoe_layer_spec(config: Any) -> Any:
    spec = local_layer_spec(config)
    spec.submodules.self_attention.module = OLMoESelfAttention
    return spec


def train(recipe: Callable[[], Any], *, has_pools: bool) -> list[float]:
    """Losses of two steps.

    Raises:
        Exception: whatever the host or the pools raise.
    """
    forget()
    destroy_moe_metrics_tracker()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        cfg = small(recipe(), Path(folder))
        cfg.checkpoint.save = cfg.checkpoint.load = None
        if has_pools:
            apply_pools(cfg, PoolConfig(pool_min=4))
        pretrain(cfg, pool_forward_step if has_pools else forward_step)
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", printed.getvalue())]


def outcome(recipe: Callable[[], Any], *, has_pools: bool) -> dict[str, Any]:
    """The losses, or the error."""
    try:
        return {"losses": train(recipe, has_pools=has_pools)}
    except Exception as error:
        if "--trace" in sys.argv:
            logging.disable(0)
            logging.exception("run")
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    logging.disable(logging.CRITICAL)
    exaone_moe_provider.HAVE_TE = False  # the stand-in was there when it was imported
    hub_configs.use()
    functions = {
        name.partition(".")[2]: recipe for name, recipe in reversed([*bridge_coverage.recipes()])
    }
    found: dict[str, Any] = {}
    for family in [name for name in sys.argv[1:] if name in RECIPES] or RECIPES:
        recipe = functions[RECIPES[family]]
        found[family] = outcome(recipe, has_pools=True)
        if "error" in found[family]:
            found[family]["stock"] = outcome(recipe, has_pools=False).get("error")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
