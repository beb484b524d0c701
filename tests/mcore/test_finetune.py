"""Frozen weights stay what they are, to the bit, and what the policy names is trained, in every place it can lie."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from support import checkpoints, training
from support.checkpoints import selection_of
from support.training import Case

from emo_megatron.checkpoint.names import EXPERTS, ROUTER, split_name
from emo_megatron.experts.selection import Selection
from emo_megatron.mcore.finetune import add_finetune_args, freeze_hook

LAYERS = (2, 3, 4)
KEPT = ((0, 1, 5), (2, 3, 4), (1, 6, 7))


def _selection(**changes):
    fields = {"num_experts": 8, "experts": KEPT, "layers": LAYERS, "method": "mean_prob"}
    return Selection(**fields | {"seed": None, "model": "m"} | changes)


def _train(case, policy, selection):
    """A step of a frozen model.

    Returns:
        This rank's weights before and after, the number of them it says it trains, and the MoE layers whose experts got
        a gradient: weight decay alone changes weights too.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from support import shards, training

    from emo_megatron.mcore.finetune import freeze

    trained = []
    build = training._model

    def frozen(*args):
        model = build(*args)
        trained.append(freeze(model, policy=policy, selection=selection))
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
    ("case", "policy", "selection"),
    [
        (Case(), "experts", None),
        (Case(), "experts+router", None),
        (Case(recompute="moe"), "experts", _selection()),
        (Case(recompute="full"), "experts", None),
        (Case(name="EP2", dp=2, ep=2, distributed_optimizer=True), "experts", _selection()),
        (
            Case(name="EP2, one rank", dp=2, ep=2, distributed_optimizer=True),
            "experts",
            _selection(experts=((0, 1), (2, 3), (0, 3))),
        ),
        (Case(name="TP2 x PP2", tp=2, pp=2), "experts+router", None),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else None,
)
def test_only_what_the_policy_names_is_trained(ranks, case, policy, selection):
    from support import shards

    case = training.with_samples(case, 4)
    answers = ranks(case.world_size).run(_train, case=case, policy=policy, selection=selection)
    before, after = (shards.join([answer[i] for answer in answers]) for i in (0, 1))
    assert set.union(*(answer[3] for answer in answers)) == set(LAYERS)
    num_trained = 0
    for name, was in before.items():
        layer, rest = split_name(name)
        has_changed = was != after[name]
        if rest.startswith(EXPERTS):
            kept = range(8) if selection is None else selection.experts[layer - 2]
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


def _flags(tmp_path, *flags, no_save_optim=True, **selection):
    file = _selection(**selection).save(tmp_path / "s.json")
    given = [str(file) if flag == "FILE" else flag for flag in flags]
    args = add_finetune_args(argparse.ArgumentParser()).parse_args(given)
    model = {"num_experts": 8, "mtp_num_layers": None}
    return argparse.Namespace(**vars(args), **model, no_save_optim=no_save_optim)


def _hooked(flags, layout):
    """The parameters that a rank trains after the hook."""
    from support import checkpoints

    from emo_megatron.mcore.finetune import freeze_hook

    model = checkpoints.model({}, layout=layout)
    freeze_hook(flags)([model])
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _started(flags, loaded):
    """What a model says at its first and its second forward pass, loaded from a checkpoint if there is one."""
    from support import checkpoints

    from emo_megatron.mcore.finetune import freeze_hook

    model = checkpoints.model({}, layout={}, seed=6).eval()
    freeze_hook(flags)([model])
    if loaded is not None:
        checkpoints.load(loaded, model)
    try:
        checkpoints.forward(model)
    except ValueError as error:
        return str(error)
    model.decoder.layers[0].mlp.router.weight.data.zero_()
    checkpoints.forward(model)
    return ""


def test_a_selection_of_the_model_in_load(ranks, tmp_path):
    """Rank 1 of two has none of its experts; a Selection of another model is refused, whatever it is loaded with."""
    for name, seed in (("parent", 5), ("other", 6)):
        folder = str(tmp_path / name)
        ranks(1).run(checkpoints.save, folder=folder, layout={}, config={}, seed=seed)
    file = selection_of(tmp_path / "parent", [[0, 1], [2, 3]]).save(tmp_path / "s.json")
    given = ["--train-only", "experts", "--train-selection", str(file)]
    parsed = add_finetune_args(argparse.ArgumentParser()).parse_args(given)

    def flags(load, *, pretrained=None, step=None):
        model = {"num_experts": 8, "mtp_num_layers": None, "no_save_optim": True}
        start = {"load": load, "pretrained_checkpoint": pretrained, "ckpt_step": step}
        return argparse.Namespace(**vars(parsed) | model | start)

    layout = {"expert_model_parallel_size": 2}
    trained = ranks(2).run(_hooked, flags=flags(str(tmp_path / "parent")), layout=layout)
    assert trained[0] > 0
    assert trained[1] == 0
    # a run that has not saved yet starts from the other checkpoint
    fresh = str(tmp_path / "fresh")
    assert freeze_hook(flags(fresh, pretrained=str(tmp_path / "parent"))) is not None
    for wrong in (
        flags(str(tmp_path / "other")),
        flags(str(tmp_path / "other"), step=7),
        flags(fresh, pretrained=str(tmp_path / "other")),
    ):
        with pytest.raises(ValueError, match=r"s.json: .*made from another model: its routers"):
            freeze_hook(wrong)
    with pytest.raises(ValueError, match="name it with --load"):
        freeze_hook(flags(None))
    # Megatron would load nothing from an iteration's folder
    with pytest.raises(ValueError, match=r"--load .*iter_0000007 .*random weights"):
        freeze_hook(flags(str(tmp_path / "parent" / "iter_0000007")))
    given = flags(str(tmp_path / "parent"))
    assert ranks(1).run(_started, flags=given, loaded=str(tmp_path / "parent")) == [""]
    for loaded in (None, str(tmp_path / "other")):
        (said,) = ranks(1).run(_started, flags=given, loaded=loaded)
        assert re.search(r"did not load .*parent.* layer [12] ", said)
    with pytest.raises(ValueError, match="--train-selection cannot go with --expert-placement"):
        freeze_hook(argparse.Namespace(**vars(given), expert_placement="p.json"))


def test_flags(tmp_path):
    assert freeze_hook(_flags(tmp_path)) is None
    # a hybrid or dense stage without experts
    with pytest.raises(ValueError, match="leaves this pipeline stage nothing to train"):
        freeze_hook(_flags(tmp_path, "--train-only", "experts"))([torch.nn.Linear(2, 2)])
    for policy in ("all", "experts+router"):
        with pytest.raises(ValueError, match=r"needs --train-only experts; got " + policy[:3]):
            freeze_hook(_flags(tmp_path, "--train-selection", "FILE", "--train-only", policy))
    chosen = ("--train-only", "experts", "--train-selection", "FILE")
    with pytest.raises(ValueError, match="needs --no-save-optim"):
        freeze_hook(_flags(tmp_path, *chosen, no_save_optim=False))
    given = _flags(tmp_path, *chosen)
    given.mtp_num_layers = 1
    with pytest.raises(ValueError, match="cannot go with --mtp-num-layers"):
        freeze_hook(given)
    with pytest.raises(ValueError, match="of a model of 16 experts, and --num-experts is 8"):
        freeze_hook(_flags(tmp_path, *chosen, num_experts=16))
