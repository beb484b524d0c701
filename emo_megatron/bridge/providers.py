"""Bridge's model providers with PoolConfig's fields: `model.pool_min=8` on the command line and in run_config.yaml.

Only dataclasses may be in this module: a run_config.yaml may name any of its objects, and Bridge then calls the object.
"""

from megatron.bridge.models.exaone.exaone_moe.exaone_moe_provider import ExaoneMoeModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.models.minimax_m3.minimax_m3_bridge import MiniMaxM3ModelProvider
from megatron.bridge.models.mla_provider import MLAModelProvider
from megatron.bridge.models.olmoe.olmoe_provider import OlMoEModelProvider
from megatron.bridge.models.stepfun.step35_provider import Step35ModelProvider

from emo_megatron.bridge.pooled import PooledGPT, PooledHybrid, pooled

PoolGPTModelProvider = pooled(GPTModelProvider, PooledGPT)
PoolMLAModelProvider = pooled(MLAModelProvider, PooledGPT)
PoolOlMoEModelProvider = pooled(OlMoEModelProvider, PooledGPT)
PoolExaoneMoeModelProvider = pooled(ExaoneMoeModelProvider, PooledGPT)
PoolMiniMaxM3ModelProvider = pooled(MiniMaxM3ModelProvider, PooledGPT)
PoolStep35ModelProvider = pooled(Step35ModelProvider, PooledGPT, predicts_by_dense_layers=True)
PoolHybridModelProvider = pooled(HybridModelProvider, PooledHybrid)
