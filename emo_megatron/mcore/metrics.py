"""Pool metrics in Megatron's own MoE tracker, so that TensorBoard, W&B and the console show them."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from emo_megatron.config import PoolConfig

TOKEN_METRICS = ("token_entropy", "load_imbalance")
"""Mean entropy of the scores a token (nats); largest over mean expert load."""
DOCUMENT_METRICS = ("experts_per_document",)
"""Distinct experts a document uses (on a rank: of the document's tokens that the rank routes)."""
POOL_METRICS = ("pool_size", "document_entropy")
"""Mean pool size (routed experts); mean entropy of a document's summed probabilities (nats)."""


class PoolMetricsTracker(MoEMetricsTracker):
    """Reports the pool metrics next to the losses Megatron names itself.

    Args:
        names: metrics to add; every rank must add the same ones, since reporting reduces each over all ranks.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def report(self, *args: Any, track_names: Any = None, **kwargs: Any) -> str:
        """As MoEMetricsTracker.report, with the pool metrics added to the names asked for."""
        if track_names is not None:
            asked = [track_names] if isinstance(track_names, str) else list(track_names)
            track_names = asked + [name for name in self.names if name not in asked]
        return super().report(*args, track_names=track_names, **kwargs)


def install_metrics(pool: PoolConfig, config: TransformerConfig, *, has_documents: bool) -> None:
    """Make Megatron report the metrics that this configuration's routers record, and no others.

    Args:
        pool: the method.
        config: Megatron's configuration of the model.
        has_documents: whether training batches carry document boundaries.
    """
    types, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(types, str):
        types, coefficients = [types], [coefficients]
    balance = dict(zip(types, coefficients, strict=True)).get("global_aux_loss", 0.0)
    names: tuple[str, ...] = POOL_METRICS if pool.is_on else ()
    if balance > 0 or config.moe_z_loss_coeff:
        names += TOKEN_METRICS + (DOCUMENT_METRICS if has_documents else ())
    set_moe_metrics_tracker(PoolMetricsTracker(names))
