"""Pools in layers of multi-token prediction: their numbers, what counts in them, and the stock model without pools."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK
from emo_megatron.mcore.router import PoolRouter

BOUNDS = [0, 1, 6, 6, 16, 30, 32]
DEPTHS = 2
LAYERS = 2


def _model(pool, **options):
    """With pools in every layer, or stock."""
    return tiny.model(pool, num_layers=LAYERS, mtp_num_layers=DEPTHS, mtp_loss_scaling_factor=0.3, **options)


def _forward(model, packed=None, seed=1):
    batch = tiny.batch(seed)
    if packed is None:
        # samples side by side
        batch = {key: value.view(tiny.ROWS, tiny.SEQ) for key, value in batch.items()}
    return model(
        batch["input_ids"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=torch.ones_like(batch["labels"], dtype=torch.float32),
        packed_seq_params=packed,
    )


def _seen(**options):
    """Router's number and depth, and the ids it routed by in each of two forward passes."""
    tiny.setup()
    CLOCK.consumed_samples = 0
    model = _model(PoolConfig(pool_min=3), **options)
    seen, kept = [], []
    for router in (m for m in model.modules() if isinstance(m, PoolRouter)):

        def observe(_logits, ids_T, router=router):
            seen.append((router.layer_number, router.mtp_depth, ids_T.tolist()))
            kept.append(router.scope)

        router.observe_logits = observe
    for seed in (1, 2):
        _forward(model, tiny.packed(BOUNDS), seed)
    CLOCK.consumed_samples = None
    scopes = {id(scope): sorted(scope.pools) for scope in kept}
    return seen, list(scopes.values())


def _ids(depth):
    return [
        document if place + depth < end else -1
        for document, (start, end) in enumerate(itertools.pairwise(BOUNDS))
        for place in range(start, end)
    ]


@pytest.mark.parametrize("repeated", [False, True])
def test_layers_count_on_and_route_what_has_a_target(ranks, repeated):
    ((seen, pooled),) = ranks(1).run(_seen, mtp_use_repeated_layer=repeated)
    one_pass = [(1, 0, _ids(0)), (2, 0, _ids(0)), (3, 1, _ids(1)), (4, 2, _ids(2))]
    assert seen == one_pass * 2
    assert pooled == [[1, 2, 3, 4]] * 2, "one scope per micro-batch, with a pool of every layer"


def _trained(pool, **options):
    """Losses, gradients, losses of prediction, and the keys of a checkpoint."""
    tiny.setup()
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker = {}
    model = _model(pool, **options)
    with torch.no_grad():
        for seed, (_, weight) in enumerate(sorted(model.named_parameters())):
            generator = torch.Generator().manual_seed(seed)
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    losses = _forward(model)
    losses.mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    told = MTPLossLoggingHelper.tracker["loss_values"].clone()
    keys = sorted(model.sharded_state_dict())
    MTPLossLoggingHelper.tracker = {}
    return losses.detach(), gradients, told, keys


@pytest.mark.parametrize("repeated", [False, True])
def test_without_pools_it_is_the_stock_model(ranks, repeated):
    options = {
        "mtp_use_repeated_layer": repeated,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.5,
    }
    stock, ours = (ranks(1).run(_trained, pool=p, **options)[0] for p in (None, PoolConfig()))
    assert torch.equal(stock[0], ours[0])
    assert torch.equal(stock[2], ours[2])
    assert stock[3] == ours[3], "checkpoints have the same keys"
    assert stock[1].keys() == ours[1].keys()
    for name, gradient in stock[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-5, atol=1e-7)
