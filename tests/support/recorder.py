"""What the routers of a rank decided, and by how much."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

NOISE = 1e-4
"""Of logits, under which no decision may change that is to be compared."""


class Recorder:
    """Notes what the routers of this rank decide in training; what recomputation repeats is passed over."""

    def __init__(self, chunks: list[Any]) -> None:
        from emo_megatron.mcore.router import PoolRouter

        self.places_T = torch.empty(0)
        self.decisions: dict[tuple[int, str], dict[Any, tuple[int, ...]]] = {}
        self.margin = float("inf")
        self.noise = torch.Generator().manual_seed(3)
        for module in (m for chunk in chunks for m in chunk.modules()):
            if isinstance(module, PoolRouter):
                module.routing = functools.partial(self._routing, module, module.routing)

    def _routing(self, router: Any, routing: Any, logits: Tensor, **options: Any) -> Any:
        from emo_megatron.mcore.compat import is_in_backward

        answer = routing(logits, **options)
        if is_in_backward() or not router.training:
            return answer
        scope = router.scope
        pool_DE = scope.pools.get(router.layer_number)
        logits_TE = logits.detach().flatten(0, -2).float()
        # at a depth of multi-token prediction fewer positions have a vote
        ids_T = router._document_ids(logits_TE, None)
        if router.score_function == "softmax" and router.num_groups is None:
            self._margins(router, logits_TE, ids_T, pool_DE)
        elif router.tp_dp_cp_group.size() == 1:
            self._margin_of_noise(router, logits_TE, ids_T, scope, pool_DE)
        self._record(router.layer_number, answer[1], ids_T, scope, pool_DE)
        return answer

    def _record(self, layer: int, map_TE: Tensor, ids_T: Tensor, scope: Any, pool_DE: Tensor | None) -> None:
        experts = self.decisions.setdefault((layer, "experts"), {})
        for place, document, chosen in zip(self.places_T, ids_T, map_TE, strict=True):
            if document >= 0:
                experts[int(place)] = tuple(chosen.nonzero().flatten().tolist())
        if pool_DE is not None:
            pools = self.decisions.setdefault((layer, "pools"), {})
            segments = scope.segments
            starts_D = segments.starts_D - segments.rows_D * segments.tokens_per_sample
            is_empty = torch.bincount(scope.segments.document_ids_T + 1, minlength=len(pool_DE) + 1)
            for document, pool in enumerate(pool_DE):
                if is_empty[document + 1] > 0:
                    key = (int(scope.sample_positions_D[document]), int(starts_D[document]))
                    pools[key] = tuple(pool.nonzero().flatten().tolist())

    def _margins(self, router: Any, logits_TE: Tensor, ids_T: Tensor, pool_DE: Any) -> None:
        """Smallest gap in probability between an expert that was taken and one that was not."""
        for document in ids_T.unique().tolist():
            rows = logits_TE[ids_T == document]
            if document < 0:
                continue
            inside = torch.ones(rows.shape[1], dtype=torch.bool)
            if pool_DE is not None:
                inside = pool_DE[document]
                mean = rows.softmax(-1).mean(0)
                if not inside.all():
                    self._note(mean[inside].min() - mean[~inside].max())
            scores = rows.masked_fill(~inside, float("-inf")).softmax(-1)
            best = scores.topk(min(router.topk + 1, scores.shape[1])).values
            if inside.sum() > router.topk:
                self._note((best[:, router.topk - 1] - best[:, router.topk]).min())

    def _margin_of_noise(
        self, router: Any, logits_TE: Tensor, ids_T: Tensor, scope: Any, pool_DE: Tensor | None
    ) -> None:
        """A margin of 0 where noise far above rounding changes what gates, groups or biases decide."""
        from emo_megatron import ops

        wanted: Any = None
        for scale in (0.0, *[NOISE] * 4):
            noisy_TE = logits_TE + scale * torch.randn(logits_TE.shape, generator=self.noise)
            if pool_DE is not None:
                _, choosing_DE = router._document_scores(noisy_TE, ids_T, scope, "reference")
                choosing_DE, sizes_D = router._within_groups(choosing_DE, pool_DE.sum(dim=-1))
                pool_DE = ops.select_pool(choosing_DE, pool_sizes_D=sizes_D, backend="reference")
            routed = ops.pool_topk(
                noisy_TE,
                document_ids_T=ids_T,
                pool_DE=pool_DE,
                top_k=router.topk,
                score_function=router.score_function,
                pre_softmax=router.config.moe_router_pre_softmax,
                expert_bias_E=router.expert_bias,
                num_groups=router.num_groups,
                group_topk=router.config.moe_router_group_topk,
                backend="reference",
            )
            is_real_T1 = (ids_T >= 0)[:, None]
            found = [pool_DE, routed.routing_map_TE & is_real_T1]
            wanted = wanted or found
            if not all(a is b or torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                self.margin = 0.0

    def _note(self, gap: Tensor) -> None:
        self.margin = min(self.margin, float(gap))
