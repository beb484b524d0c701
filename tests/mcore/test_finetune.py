"""Frozen weights stay what they are, to the bit, and what the policy names is trained, in every place it can lie."""

from __future__ import annotations

import pytest
from megatron.core.transformer.moe.moe_layer import MoELayer
from support import shards, training
from support.training import Case

from emo_megatron.checkpoint.names import EXPERTS, ROUTER, split_name
from emo_megatron.mcore.finetune import freeze

LAYERS = (2, 3, 4)
KEPT = {2: (0, 1, 5), 3: (2, 3, 4), 4: (1, 6, 7)}


def _train(case, policy, experts):
    """A step of a frozen model.

    Returns:
        This rank's weights before and after, the number of them it says it trains, and the MoE layers whose experts got
        a gradient: weight decay alone changes weights too.
    """
    trained = []
    build = training._model

    def frozen(*args):
        model = build(*args)
        trained.append(freeze(model, policy=policy, experts=experts))
        return model

    training._model = frozen
    try:
        chunks, optimizer = training.build(case, seed=5)
    finally:
        training._model = build
    before = shards.parts([chunk.module for chunk in chunks])
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    training.forward_backward(case, chunks, consumed=0)
    layers = {
        m.layer_number
        for chunk in chunks
        for m in chunk.modules()
        if isinstance(m, MoELayer) and any(p.requires_grad and bool(p.main_grad.any()) for p in m.experts.parameters())
    }
    optimizer.step()
    after = shards.parts([chunk.module for chunk in chunks])
    training.break_cycles(chunks)
    return before, after, sum(trained), layers


@pytest.mark.parametrize(
    ("case", "policy", "experts"),
    [
        (Case(), "experts", None),
        (Case(), "experts+router", None),
        (Case(recompute="moe"), "experts", KEPT),
        (Case(recompute="full"), "experts", None),
        (Case(name="EP2", dp=2, ep=2, distributed_optimizer=True), "experts", KEPT),
        (
            Case(name="EP2, one rank", dp=2, ep=2, distributed_optimizer=True),
            "experts",
            {2: (0, 1), 3: (2, 3), 4: (0, 3)},
        ),
        (Case(name="TP2 x PP2", tp=2, pp=2), "experts+router", None),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else None,
)
def test_only_what_the_policy_names_is_trained(ranks, case, policy, experts):
    case = training.with_samples(case, 4)
    answers = ranks(case.world_size).run(_train, case=case, policy=policy, experts=experts)
    before, after = (shards.join([answer[i] for answer in answers]) for i in (0, 1))
    assert set.union(*(answer[3] for answer in answers)) == set(LAYERS)
    num_trained = 0
    for name, was in before.items():
        layer, rest = split_name(name, num_layers=4)
        has_changed = was != after[name]
        if rest.startswith(EXPERTS):
            kept = range(8) if experts is None else experts[layer]
            num_trained += len(kept) * was[0].numel()
            changed = has_changed.flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert changed == list(kept), name
        elif rest.startswith(ROUTER) and policy == "experts+router":
            num_trained += was.numel()
            assert has_changed.any(), name
        else:
            assert not has_changed.any(), name
    if case.tp * case.dp == 1:
        assert sum(answer[2] for answer in answers) == num_trained
