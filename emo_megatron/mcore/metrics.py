"""Pool metrics in Megatron's own MoE tracker, so that TensorBoard, W&B and the console show them.

Forward passes only add integers: the counts of the routing ops are summed over the micro-batches of a step. Ratios,
with their collectives, are computed once per step, when Megatron reports. Each metric is a ratio of sums over all
documents or all tokens of the step, so the metrics are identical under every parallel layout.
"""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from emo_megatron import balance, ops
from emo_megatron.config import PoolConfig
from emo_megatron.ops.reference import NUM_TOTALS, SCORE_FRACTION_BITS

TOKEN_METRICS = ("token_entropy", "load_imbalance", "nonfinite_tokens")
"""Mean entropy of a token's scores (nats); largest expert load of the step divided by the mean load; tokens per layer
with logits that are not finite, which no pool, loss or other metric counts."""
GROUP_METRICS = ("tokens_over_groups",)
"""Share of tokens with experts in more groups than --moe-router-group-topk, because their pools have too few experts
in each group."""
BIAS_METRICS = ("experts_in_no_pool",)
"""Number of experts that are in no pool of the step; pools of all experts are not counted."""
DOCUMENT_METRICS = ("experts_per_document",)
"""Mean number of distinct experts that a document's tokens use."""
POOL_METRICS = ("pool_size", "document_entropy")
"""Mean pool size (routed experts); mean entropy of a document's summed probabilities (nats)."""
MAX_HELD = 1 << 16
"""Largest number of stored entries (micro-batches x layers) of used experts until a report. If the host never
reports, the oldest entries are dropped."""


class PoolMetricsTracker(MoEMetricsTracker):
    """Reports the pool metrics together with Megatron's own losses.

    Args:
        names: metrics to add. Every rank must add the same metrics, because a report reduces each one over all ranks.
        num_layers: number of layers in all pipeline stages, including multi-token prediction.
        adds_mtp_layers: whether multi-token-prediction layers must be added to the host's number of MoE layers.
            Megatron always adds these layers, so that its mean over layers is too small where they have no experts
            or are already counted.

    Attributes:
        tp_cp_group: ranks that hold tokens of the same documents.
        tp_dp_cp_group: all ranks that route a layer. A router sets both groups before it adds counts.
    """

    tp_cp_group: dist.ProcessGroup
    tp_dp_cp_group: dist.ProcessGroup

    def __init__(self, names: tuple[str, ...], *, num_layers: int, adds_mtp_layers: bool) -> None:
        super().__init__()
        self.names = names
        self.num_layers = num_layers
        self.adds_mtp_layers = adds_mtp_layers
        self._local_X: dict[int, Tensor] = {}
        self._global_X: dict[int, Tensor] = {}
        self._documents: dict[int, Tensor] = {}
        self._used: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._pooled: dict[int, Tensor] = {}

    def add_counts(self, layer_number: int, counts_X: Tensor, *, is_reduced: bool) -> None:
        """Add a micro-batch's `Routing.counts_X`, [E + 4] int64: of all ranks if `is_reduced`, else of this rank."""
        _add(self._global_X if is_reduced else self._local_X, layer_number, counts_X)

    def add_documents(
        self, layer_number: int, used_DW: Tensor, *, pool_DE: Tensor | None, scores_DE: Tensor | None
    ) -> None:
        """Add the pools and used experts of a micro-batch's documents.

        Args:
            used_DW: `ops.experts_used` of this rank.
            pool_DE, scores_DE: the documents' pools and the scores that chose the pools, equal on all ranks of
                tp_cp_group; None: the pools were not chosen in this pass.
        """
        is_split = self.tp_cp_group.size() > 1
        if is_split:
            # a report combines the used experts of all ranks that share the documents
            held = self._used[layer_number]
            held.append(used_DW)
            if len(held) * len(self._used) > MAX_HELD:
                del held[0]
        if scores_DE is not None or not is_split:
            statistics_S = ops.document_statistics(scores_DE, pool_DE=pool_DE, used_DW=None if is_split else used_DW)
            _add(self._documents, layer_number, statistics_S)
        if pool_DE is not None and scores_DE is not None and "experts_in_no_pool" in self.names:
            # an empty document also has a pool, but its scores are zero
            counts_D1 = ~pool_DE.all(dim=-1, keepdim=True) & (scores_DE.sum(dim=-1, keepdim=True) > 0)
            _add(self._pooled, layer_number, (pool_DE & counts_D1).sum(dim=0))

    def report(self, loss_scale: float, *args: Any, track_names: Any = None, **kwargs: Any) -> str:
        """MoEMetricsTracker.report, with the pool metrics added to the requested names."""
        self._make_ratios(loss_scale)
        if track_names is not None:
            asked = [track_names] if isinstance(track_names, str) else list(track_names)
            track_names = asked + [name for name in self.names if name not in asked]
            for name in asked:
                # in a hybrid model the host's number of rows differs from the routers' number of rows
                self.ensure_initialized(name, self.num_layers)
        return super().report(loss_scale, *args, track_names=track_names, **kwargs)

    def _count_moe_layers(self, num_layers: Any, moe_layer_freq: Any, mtp_num_layers: Any) -> int:
        counted = mtp_num_layers if self.adds_mtp_layers else None
        return int(super()._count_moe_layers(num_layers, moe_layer_freq, counted))

    @property
    def _kept(self) -> tuple[dict[int, Any], ...]:
        return self._local_X, self._global_X, self._documents, self._used, self._pooled

    def clear(self) -> None:
        """Delete all recorded values."""
        super().clear()
        for kept in self._kept:
            kept.clear()

    def forget(self, layer_number: int) -> None:
        """Delete the recorded counts of one layer."""
        for kept in self._kept:
            kept.pop(layer_number, None)

    def _make_ratios(self, loss_scale: float) -> None:
        """Turn the counts of this stage's layers into the entries that the parent class sums over pipeline stages.

        All ranks of one stage have the same layers, so all of them take part in the same collectives.
        """
        found = self._token_ratios() | self._document_ratios() | self._unpooled()
        for name in self.names:
            layers, ratios_L = found.get(name, ([], None))
            self.ensure_initialized(name, self.num_layers, None if ratios_L is None else ratios_L.device)
            self._metrics[name].needs_dp_avg = False
            if ratios_L is not None:
                # the parent class multiplies by loss_scale, to average over micro-batches
                rows = [layer - 1 for layer in layers]
                self._metrics[name].values[rows] = (ratios_L / loss_scale).float()

    def _token_ratios(self) -> dict[str, tuple[list[int], Tensor]]:
        counts = dict(self._global_X)
        if self._local_X:
            local = sorted(self._local_X)
            stacked_LX = torch.stack([self._local_X[layer] for layer in local])
            summed_LX = balance.reduce_counts(stacked_LX, group=self.tp_dp_cp_group)
            counts |= dict(zip(local, summed_LX, strict=True))
        if not counts:
            return {}
        layers = sorted(counts)
        counts_LX = torch.stack([counts[layer] for layer in layers])
        num_experts = counts_LX.shape[1] - NUM_TOTALS
        load_LE, totals_LN = counts_LX.double().split([num_experts, NUM_TOTALS], dim=1)
        tokens_L, nonfinite_L, over_groups_L, entropy_L = totals_LN.unbind(1)
        self._warn_of_nonfinite(layers, nonfinite_L)
        return {
            "token_entropy": (layers, _nats(entropy_L) / tokens_L.clamp(min=1)),
            "load_imbalance": (layers, load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-9)),
            "nonfinite_tokens": (layers, nonfinite_L),
            "tokens_over_groups": (layers, over_groups_L / tokens_L.clamp(min=1)),
        }

    def _document_ratios(self) -> dict[str, tuple[list[int], Tensor]]:
        layers = sorted(self._documents.keys() | self._used.keys())
        if not layers:
            return {}
        sums = dict(self._documents)
        if self._used:
            for layer, statistics_S in self._joined_statistics().items():
                _add(sums, layer, statistics_S)
        own_LS = torch.stack([sums[layer] for layer in layers])
        documents, sizes, entropy, users, used = (
            balance.reduce_counts(own_LS, group=self.tp_dp_cp_group).double().unbind(1)
        )
        return {
            "pool_size": (layers, sizes / documents.clamp(min=1)),
            "document_entropy": (layers, _nats(entropy) / documents.clamp(min=1)),
            "experts_per_document": (layers, used / users.clamp(min=1)),
        }

    def _unpooled(self) -> dict[str, tuple[list[int], Tensor]]:
        if not self._pooled:
            return {}
        layers = sorted(self._pooled)
        pools_LE = torch.stack([self._pooled[layer] for layer in layers])
        pools_LE = balance.reduce_counts(pools_LE, group=self.tp_dp_cp_group)
        return {"experts_in_no_pool": (layers, (pools_LE == 0).sum(dim=1).double())}

    def _joined_statistics(self) -> dict[int, Tensor]:
        """Layer -> [5] int64: statistics of the experts that documents use, over all ranks that share a document."""
        words = {layer: torch.cat(self._used[layer]) for layer in sorted(self._used)}
        mine_RW = torch.cat(list(words.values()))
        parts = [torch.empty_like(mine_RW) for _ in range(self.tp_cp_group.size())]
        dist.all_gather(parts, mine_RW, group=self.tp_cp_group)
        joined = functools.reduce(torch.bitwise_or, parts).split([len(w) for w in words.values()])
        return {
            layer: ops.document_statistics(None, used_DW=used_DW) for layer, used_DW in zip(words, joined, strict=True)
        }

    def _warn_of_nonfinite(self, layers: list[int], nonfinite_L: Tensor) -> None:
        if self.tp_dp_cp_group.rank() != 0:
            return
        for layer, count in zip(layers, nonfinite_L.tolist(), strict=True):
            if count:
                warnings.warn(
                    f"layer {layer}: the router's logits of {count:.0f} tokens of this step are NaN or infinite. "
                    "These tokens count in no pool and in no load-balancing loss, and their outputs are NaN",
                    stacklevel=2,
                )


def _add(sums: dict[int, Tensor], layer_number: int, values_X: Tensor) -> None:
    before_X = sums.get(layer_number)
    sums[layer_number] = values_X if before_X is None else before_X + values_X


def _nats(fixed_L: Tensor) -> Tensor:
    return fixed_L / 2.0**SCORE_FRACTION_BITS


def pool_metrics() -> PoolMetricsTracker | None:
    """The installed tracker of pool metrics; None if none is installed, and then routers record no metrics."""
    tracker = get_moe_metrics_tracker()
    return tracker if isinstance(tracker, PoolMetricsTracker) else None


def forget_layer(layer_number: int) -> None:
    """Delete the installed tracker's values of one layer, all of the current step: hosts report and clear per step."""
    tracker = get_moe_metrics_tracker()
    for entry in tracker.metrics.values():
        entry.values[layer_number - 1 : layer_number] = 0
    if isinstance(tracker, PoolMetricsTracker):
        tracker.forget(layer_number)


def install_metrics(pool: PoolConfig, config: TransformerConfig, *, has_documents: bool) -> None:
    """Make Megatron report exactly the metrics that this configuration's routers record.

    Metrics of documents are reported only if training batches carry document boundaries (`has_documents`).
    """
    names: tuple[str, ...] = (*(POOL_METRICS if pool.is_on else ()), *TOKEN_METRICS)
    names += DOCUMENT_METRICS if has_documents else ()
    names += GROUP_METRICS if pool.is_on and config.moe_router_group_topk else ()
    names += BIAS_METRICS if pool.is_on and config.moe_router_enable_expert_bias else ()
    frequency, last = config.moe_layer_freq, config.num_layers - 1
    is_last_sparse = last % frequency == 0 if isinstance(frequency, int) else bool(frequency[last])
    # in a hybrid model the host already counts the MoE layers of the whole pattern
    is_hybrid = getattr(config, "is_hybrid_model", False)
    tracker = PoolMetricsTracker(names, num_layers=num_rows(config), adds_mtp_layers=is_last_sparse and not is_hybrid)
    set_moe_metrics_tracker(tracker)


def num_rows(config: TransformerConfig) -> int:
    """Number of layers in all pipeline stages: decoder layers first, then layers of multi-token prediction.

    Megatron's routers record the same number of rows. Stages sum their rows, so every stage must use this number.
    """
    return int(config.num_layers + (config.mtp_num_layers or 0))
