"""Bridge's model providers with PoolConfig's fields: `model.pool_min=8` on the command line and in run_config.yaml.

This module holds dataclasses and nothing else: a run_config.yaml may name them, and Bridge then calls them.
"""

from megatron.bridge.models.exaone.exaone_moe.exaone_moe_provider import ExaoneMoeModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.models.minimax_m3.minimax_m3_bridge import MiniMaxM3ModelProvider
from megatron.bridge.models.mla_provider import MLAModelProvider
from megatron.bridge.models.olmoe.olmoe_provider import OlMoEModelProvider
from megatron.bridge.models.stepfun.step35_provider import Step35ModelProvider

from emo_megatron.bridge.pooled import PooledGPT, PooledHybrid, pooled


@pooled
class PoolGPTModelProvider(PooledGPT, GPTModelProvider):
    """Bridge's GPT provider, with pools."""


@pooled
class PoolMLAModelProvider(PooledGPT, MLAModelProvider):
    """Bridge's provider of models with multi-latent attention, with pools."""


@pooled
class PoolOlMoEModelProvider(PooledGPT, OlMoEModelProvider):
    """Bridge's OLMoE provider, with pools."""


@pooled
class PoolExaoneMoeModelProvider(PooledGPT, ExaoneMoeModelProvider):
    """Bridge's EXAONE MoE provider, with pools."""


@pooled
class PoolMiniMaxM3ModelProvider(PooledGPT, MiniMaxM3ModelProvider):
    """Bridge's MiniMax-M3 provider of text models, with pools."""


@pooled
class PoolStep35ModelProvider(PooledGPT, Step35ModelProvider):
    """Bridge's Step-3.5 provider, with pools."""

    predicts_by_dense_layers = True


@pooled
class PoolHybridModelProvider(PooledHybrid, HybridModelProvider):
    """Bridge's provider of hybrid models, with pools in their MoE layers."""
