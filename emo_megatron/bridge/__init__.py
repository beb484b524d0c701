"""Document pools in recipes of Megatron-Bridge (NeMo), and AutoBridge for Qwen2-MoE and the EMO authors' format.

    cfg = qwen3_30b_a3b_pretrain_config()
    apply_pools(cfg, PoolConfig(pool_min=8))
    pretrain(cfg, pool_forward_step)

Import this package before Bridge reads the `run_config.yaml` of a run with pools, and before AutoBridge reads a folder
of Qwen2-MoE or of the EMO authors.
"""

from emo_megatron.mcore.compat import require_bridge

require_bridge()

# ruff: noqa: E402  after the check, whose error names the package to install
import emo_megatron.bridge.hf  # noqa: F401  registers the formats
from emo_megatron.bridge.recipe import apply_pools
from emo_megatron.bridge.run_config import stock_run_config
from emo_megatron.bridge.step import pool_forward_step

__all__ = ["apply_pools", "pool_forward_step", "stock_run_config"]
