"""Pool metrics in Megatron's own MoE tracker, so that TensorBoard, W&B and the console show them."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

BALANCE_METRICS = ("token_entropy", "load_imbalance", "experts_per_document")
"""Mean entropy of the scores a token (nats); largest over mean expert load; distinct experts a document uses (on a
rank: of the document's tokens that the rank routes)."""
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


def install_metrics(*, pools_on: bool, has_losses: bool) -> None:
    """Make Megatron report the metrics this configuration records."""
    names = (*(POOL_METRICS if pools_on else ()), *(BALANCE_METRICS if has_losses else ()))
    set_moe_metrics_tracker(PoolMetricsTracker(names))
