"""Document pools in Megatron-Bridge recipes, which are NeMo's.

    cfg = qwen3_30b_a3b_pretrain_config()
    apply_pools(cfg, PoolConfig(pool_min=8))
    pretrain(cfg, pool_forward_step)

Importing this package lets Bridge read the `run_config.yaml` of a run with pools.
"""

from emo_megatron.mcore.compat import require_bridge

require_bridge()

# ruff: noqa: E402  after the check, which says what to install where an import would only fail
from emo_megatron.bridge.recipe import apply_pools
from emo_megatron.bridge.run_config import stock_run_config
from emo_megatron.bridge.step import pool_forward_step

__all__ = ["apply_pools", "pool_forward_step", "stock_run_config"]
