"""Hugging Face configurations of the models that Bridge's recipes name, for tests without the hub.

Of transformers' own classes, with the published values of what Bridge reads for routing, attention and prediction
layers; what no recipe's pools depend on is transformers' default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

DEEPSEEK: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "aux_loss_alpha": 0.001,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
NO_GROUPS = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}


def _deepseek(**values: Any) -> Any:
    return _config("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK, values)


def _deepseek_v2(**values: Any) -> Any:
    published = DEEPSEEK | {
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
        "topk_group": 3,
        "first_k_dense_replace": 1,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "num_nextn_predict_layers": 0,
        "vocab_size": 102400,
    }
    return _config("DeepseekV2Config", "DeepseekV2ForCausalLM", published, values)


def _deepseek_v2_lite() -> Any:
    return _deepseek_v2(
        hidden_size=2048,
        num_hidden_layers=27,
        n_routed_experts=64,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        intermediate_size=10944,
    )


def _deepseek_v4() -> Any:
    config = _config("DeepseekV4Config", "DeepseekV4ForCausalLM", {"num_nextn_predict_layers": 1})
    config.rope_theta = 10000.0
    config.rope_scaling = {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "rope_theta": 10000.0,
    }
    return config


def _kimi_k2() -> Any:
    return _deepseek(n_routed_experts=384, first_k_dense_replace=1, **NO_GROUPS)


def _moonlight() -> Any:
    return _deepseek(
        hidden_size=2048,
        num_hidden_layers=27,
        n_routed_experts=64,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=None,
        **NO_GROUPS,
    )


def _glm_45(**values: Any) -> Any:
    published = {
        "hidden_size": 5120,
        "num_hidden_layers": 92,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 3,
        "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 1536,
        "intermediate_size": 12288,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "use_qk_norm": True,
    }
    return _config("Glm4MoeConfig", "Glm4MoeForCausalLM", published, values)


def _glm_45_air() -> Any:
    return _glm_45(
        hidden_size=4096, num_hidden_layers=46, n_routed_experts=128, first_k_dense_replace=1, use_qk_norm=False
    )


def _glm_5() -> Any:
    config = _config("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", {"num_nextn_predict_layers": 1})
    config.indexer_rope_interleave = True
    return config


def _qwen3(**values: Any) -> Any:
    return _config("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 128, "num_experts_per_tok": 8}, values)


def _qwen3_next() -> Any:
    published = {"num_experts": 512, "num_experts_per_tok": 10}
    return _config("Qwen3NextConfig", "Qwen3NextForCausalLM", published)


def _gpt_oss(num_experts: int, num_layers: int) -> Any:
    published = {"num_local_experts": num_experts, "num_hidden_layers": num_layers}
    return _config("GptOssConfig", "GptOssForCausalLM", published)


def _step_35() -> Any:
    published = {
        "hidden_size": 4096,
        "num_hidden_layers": 45,
        "intermediate_size": 11264,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128896,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "num_experts": 288,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "use_moe_router_bias": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "need_fp32_gate": True,
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "num_nextn_predict_layers": 3,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    return _set(transformers.PretrainedConfig(), "Step3p5ForCausalLM", published)


def _nemotron(num_experts: int = 128, top_k: int = 6, latent_size: int | None = None) -> Any:
    published = {
        "n_routed_experts": num_experts,
        "num_experts_per_tok": top_k,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_latent_size": latent_size,
    }
    return _set(transformers.NemotronHConfig(), "NemotronHForCausalLM", published)


def _config(kind: str, architecture: str, published: dict[str, Any], values: dict[str, Any] | None = None) -> Any:
    config = getattr(transformers, kind)(**(published | (values or {})))
    return _set(config, architecture, {})


def _set(config: Any, architecture: str, values: dict[str, Any]) -> Any:
    config.architectures = [architecture]
    for name, value in values.items():
        setattr(config, name, value)
    return config


def _of_type(model_type: str, architecture: str) -> Callable[[], Any]:
    return lambda: _set(transformers.AutoConfig.for_model(model_type), architecture, {})


_qwen35 = _of_type("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")
_qwen3_vl = _of_type("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")

CONFIGS: dict[str, Callable[[], Any]] = {
    "deepseek-ai/DeepSeek-V2": _deepseek_v2,
    "deepseek-ai/DeepSeek-V2-Lite": _deepseek_v2_lite,
    "deepseek-ai/DeepSeek-V3": _deepseek,
    "deepseek-ai/DeepSeek-V3-Base": _deepseek,
    "deepseek-ai/DeepSeek-V4-Flash": _deepseek_v4,
    "deepseek-ai/DeepSeek-V4-Pro": _deepseek_v4,
    "moonshotai/Kimi-K2-Base": _kimi_k2,
    "moonshotai/Kimi-K2-Instruct": _kimi_k2,
    "moonshotai/Moonlight-16B-A3B": _moonlight,
    "zai-org/GLM-4.5": _glm_45,
    "zai-org/GLM-4.5-Air": _glm_45_air,
    "zai-org/GLM-5": _glm_5,
    "zai-org/GLM-5.1": _glm_5,
    "zai-org/GLM-5.2": _glm_5,
    "Qwen/Qwen3-30B-A3B": lambda: _qwen3(num_hidden_layers=48, hidden_size=2048),
    "Qwen/Qwen3-235B-A22B": lambda: _qwen3(
        num_hidden_layers=94, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _qwen3_next,
    "Qwen/Qwen3.5-35B-A3B": _qwen35,
    "Qwen/Qwen3.5-35B-A3B-Base": _qwen35,
    "Qwen/Qwen3.5-122B-A10B": _qwen35,
    "Qwen/Qwen3.5-397B-A17B": _qwen35,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _qwen3_vl,
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _qwen3_vl,
    "openai/gpt-oss-20b": lambda: _gpt_oss(32, 24),
    "openai/gpt-oss-120b": lambda: _gpt_oss(128, 36),
    "LGAI-EXAONE/K-EXAONE-236B-A23B": lambda: _config("ExaoneMoeConfig", "ExaoneMoEForCausalLM", {}),
    "MiniMaxAI/MiniMax-M3": _of_type("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration"),
    "stepfun-ai/Step-3.5-Flash": _step_35,
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": _nemotron,
    "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16": _nemotron,
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": lambda: _nemotron(512, 22, 1024),
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": lambda: _nemotron(512, 22, 2048),
}
"""Name on the hub -> the configuration. Nemotron Super's and Ultra's and Step-3.5's are not all published values."""


def use() -> None:
    """Let Bridge and transformers read these in place of the hub's.

    Raises in recipes: LookupError, for a name that is not here.
    """
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    def config(name: Any) -> Any:
        if str(name) not in CONFIGS:
            raise LookupError(f"{name} is on the hub only")
        return CONFIGS[str(name)]()

    bridge: Any = AutoBridge
    bridge.from_hf_pretrained = classmethod(lambda cls, name, *_, **__: cls.from_hf_config(config(name)))
    auto: Any = transformers.AutoConfig
    auto.from_pretrained = staticmethod(lambda name, *_, **__: config(name))
