"""Training that starts from a checkpoint's experts: which are trained, in what order they come, and what is refused."""

from __future__ import annotations

import argparse

import pytest
import torch
from support import checkpoints
from support.checkpoints import BIASED, placement_of, selection_of

from emo_megatron.config import flag
from emo_megatron.mcore.unsupported import PLACEMENT
from emo_megatron.runners.start import add_start_args, start_hooks


@pytest.fixture(scope="module")
def start(ranks, tmp_path_factory):
    """A folder with two runs, `parent` and `other`, and files made of `parent`."""
    folder = tmp_path_factory.mktemp("start")
    for name, seed in (("parent", 5), ("other", 6)):
        ranks(1).run(checkpoints.save, folder=str(folder / name), layout={}, config=BIASED, seed=seed)
    selection_of(folder / "parent", [[0, 1], [2, 3]]).save(folder / "s.json")
    placement_of(folder / "parent").save(folder / "p.json")
    placement_of(folder / "parent", model="0" * 64).save(folder / "foreign.json")
    return folder


def _args(folder, *flags, load="parent", pretrained=None, **changes):
    """Parsed flags: of their own, and Megatron's for a run that starts from `load`."""
    given = [str(folder / value) if value.endswith(".json") else value for value in flags]
    host = {"num_experts": 8, "mtp_num_layers": None, "no_save_optim": True, "ckpt_step": None, "finetune": True}
    host |= {"load": load and str(folder / load), "pretrained_checkpoint": pretrained and str(folder / pretrained)}
    return argparse.Namespace(
        **vars(add_start_args(argparse.ArgumentParser()).parse_args(given))
        | host
        | {"expert_model_parallel_size": 2}
        | changes
    )


SELECTED = ("--train-only", "experts", "--train-selection", "s.json")
PLACED = ("--expert-placement", "p.json")


@pytest.mark.parametrize(
    ("flags", "changes", "num_hooks"),
    [
        ((), {}, 0),
        (("--train-only", "experts"), {}, 1),
        (SELECTED, {}, 2),
        # a run that has not saved yet starts from the other checkpoint
        (SELECTED, {"load": "fresh", "pretrained": "parent"}, 2),
        (PLACED, {}, 1),
        (PLACED, {"finetune": False, "pretrained": "parent"}, 1),
        (PLACED, {"load": "parent/iter_0000007", "pretrained": "parent"}, 1),
    ],
)
def test_what_starts(start, flags, changes, num_hooks):
    assert len(start_hooks(_args(start, *flags, **changes))) == num_hooks


ITERATION = {"load": "parent/iter_0000007"}


@pytest.mark.parametrize(
    ("flags", "changes", "name"),
    [
        (SELECTED[2:], {}, "--train-only must be 'experts'; got 'all'"),
        ((*SELECTED[2:], "--train-only", "experts+router"), {}, r"--train-only must be 'experts'; got 'experts\+"),
        (SELECTED, {"no_save_optim": None}, "--no-save-optim"),
        (SELECTED, {"mtp_num_layers": 1}, "--mtp-num-layers"),
        ((*SELECTED, *PLACED), {}, "--expert-placement must not be given"),
        (SELECTED, {"num_experts": 16}, "--num-experts is 16"),
        (SELECTED, {"load": "other"}, "s.json: .*another model"),
        (SELECTED, {"load": "other", "ckpt_step": 7}, "s.json: .*another model"),
        (SELECTED, {"load": "fresh", "pretrained": "other"}, "s.json: .*another model"),
        (SELECTED, {"load": None}, "--load"),
        # Megatron would load nothing from an iteration's folder
        (SELECTED, ITERATION, "--load .*iter_0000007"),
        (PLACED, ITERATION, "--load .*iter_0000007"),
        (PLACED, {"ckpt_step": 9}, "iter_0000009"),
        (PLACED, {"finetune": False}, "--finetune"),
        (PLACED, {"expert_model_parallel_size": 4}, "--expert-model-parallel-size 4"),
        (("--expert-placement", "foreign.json"), {}, "another model"),
        *(
            (PLACED, {row.field: {None: "file.json", 0: 1}[row.allowed[0]]}, f"{row.flag or flag(row.field)} must ")
            for row in PLACEMENT
        ),
    ],
)
def test_what_cannot_start_is_refused(start, flags, changes, name):
    with pytest.raises(ValueError, match=name):
        start_hooks(_args(start, *flags, **changes))


def test_a_stage_without_experts_has_nothing_to_train(start):
    (hook,) = start_hooks(_args(start, "--train-only", "experts"))
    with pytest.raises(ValueError, match="--train-only"):
        hook([torch.nn.Linear(2, 2)])


def _trained(args):
    """The parameters that a rank of two trains after the hooks."""
    model = checkpoints.model(BIASED, layout={"expert_model_parallel_size": 2})
    for hook in start_hooks(args):
        hook([model])
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _started(args, loaded):
    """What a model says at its first and its second forward pass, loaded from a checkpoint if there is one."""
    model = checkpoints.model(BIASED, layout={}, seed=6).eval()
    for hook in start_hooks(args):
        hook([model])
    if loaded is not None:
        checkpoints.load(loaded, model)
    try:
        checkpoints.forward(model)
    except ValueError as error:
        return str(error)
    model.decoder.layers[0].mlp.router.weight.data.zero_()
    checkpoints.forward(model)
    return ""


def test_the_experts_of_a_selection_are_trained(ranks, start):
    """Rank 1 of two has none of them; a model that was loaded from elsewhere is refused at its first step."""
    trained = ranks(2).run(_trained, args=_args(start, *SELECTED))
    assert trained[0] > 0
    assert trained[1] == 0
    assert ranks(1).run(_started, args=_args(start, *SELECTED), loaded=str(start / "parent")) == [""]
    for loaded in (None, str(start / "other")):
        (said,) = ranks(1).run(_started, args=_args(start, *SELECTED), loaded=loaded)
        assert "did not load" in said
        assert str(start / "parent") in said
