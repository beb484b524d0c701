"""--recompute-modules moe with fp8 or fp4: Transformer Engine's checkpoint, here a stand-in, gets our closure."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny
from torch.utils.checkpoint import checkpoint

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import layer as layers


def _two_in_flight(precision):
    """Gradients of two micro-batches, and what each call of the stand-in was given.

    Both forwards run before the backwards, and before each backward the other micro-batch's scope lies on the layers.
    """
    calls = []

    def stand_in(function, distribute_saved_activations, get_rng_state_tracker, tp_group, *tensors):
        calls.append((distribute_saved_activations, tp_group.size(), len(tensors)))
        assert get_rng_state_tracker() is not None
        return checkpoint(function, *tensors, use_reentrant=True)

    tiny.setup()
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    model = tiny.model(PoolConfig(pool_min=3), **(recompute if precision else {}))
    moe_layers = [layer.mlp for layer in model.decoder.layers]
    if precision:
        for moe in moe_layers:
            # of this layer alone: the others would ask for Transformer Engine
            moe.config = copy.copy(moe.config)
            setattr(moe.config, precision, "e4m3")
    real, layers.te_checkpoint = layers.te_checkpoint, stand_in
    losses, scopes = [], []
    for seed, bounds in ((0, [0, 5, 16, 32]), (1, [0, 16, 19, 30, 32])):
        for layer in model.decoder.layers:
            layer.current_microbatch = seed
        packed = tiny.packed(bounds)
        loss = model(**tiny.batch(seed), attention_mask=None, packed_seq_params=packed).mean()
        losses.append(loss)
        scopes.append(packed.emo_scope)
    for loss, other in zip(losses, reversed(scopes), strict=True):
        for moe in moe_layers:
            moe.scope = other
        loss.backward()
    layers.te_checkpoint = real
    return {name: p.grad for name, p in model.named_parameters()}, calls


@pytest.mark.parametrize("precision", ["fp8", "fp4"])
def test_quantised_recompute_goes_through_transformer_engine_and_sees_its_own_micro_batch(once, precision):
    ((want, _),), ((got, calls),) = (once(1, _two_in_flight, precision=p) for p in (None, precision))
    # two micro-batches of two layers; recompute itself makes no further call
    assert calls == [(False, 1, 1)] * 4
    for name, gradient in want.items():
        assert torch.equal(gradient, got[name]), name
