"""The pools a checkpoint says it was trained with; an attempt after a failure is the run from its start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from unittest import mock

import pytest
from support.pretraining import logged, pretrain

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import combinations, router_documents
from emo_megatron.mcore import resume as checkpoint
from emo_megatron.mcore.context import CLOCK

STAND_INS = Path(__file__).resolve().parents[1] / "support" / "stand_ins"
ASKED = argparse.Namespace(load="runs/it", finetune=False, override_pool_config=False)


def _stored(**flags):
    """A checkpoint of a run with these flags and no other of ours."""
    found = (ASKED, argparse.Namespace(**flags))
    return mock.patch.object(checkpoint, "load_args_from_checkpoint", return_value=found)


def test_what_an_older_checkpoint_does_not_know_is_as_by_default():
    with _stored(pool_min=3, pool_seed=9):
        assert checkpoint.stored_pool_config(ASKED) == PoolConfig(pool_min=3, pool_seed=9)
        checkpoint.check_resume(PoolConfig(pool_min=3, pool_seed=9), ASKED)
    with _stored(num_experts=8):
        assert checkpoint.stored_pool_config(ASKED) == PoolConfig()


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ({}, {"pool_skew": 2.0}),
        ({}, {"pool_delay_samples": 8}),
        ({"pool_skew": 2.0, "pool_delay_samples": 8}, {"pool_skew": 2.0}),
        ({"pool_skew": 2.0, "pool_delay_samples": 8}, {"pool_delay_samples": 8}),
    ],
)
def test_other_sizes_or_another_start_are_reported_by_flag(stored, asked):
    pool = PoolConfig(pool_min=3, **asked)
    with _stored(pool_min=3, **stored), pytest.raises(ValueError, match="--pool-") as caught:
        checkpoint.check_resume(pool, ASKED)
    differing = {name for name in stored | asked if stored.get(name) != asked.get(name)}
    for name in ("pool_skew", "pool_delay_samples", "pool_min"):
        assert (f"--{name.replace('_', '-')} was" in str(caught.value)) == (name in differing)


@pytest.mark.slow
def test_a_run_that_starts_over_repeats_its_steps(data_prefix, monkeypatch):
    paths = [str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    flags = ["--pool-min", 3, "--inprocess-restart", "--inprocess-active-world-size", 1]
    output = pretrain(1, *flags, data=data_prefix, in_forks=False)
    for name in ("lm loss", "pool_size", "experts_per_document", "global_load_balancing_loss"):
        values = logged(output, name)
        # two steps before the failure, then all four
        assert len(values) == 6, name
        assert values[:2] == values[2:4], name


def test_nothing_of_an_attempt_is_kept():
    CLOCK.consumed_samples = 8
    router_documents.forward_with_documents(lambda: None, documents := object())
    assert router_documents.current_documents() is documents
    checkpoint.forget_attempt()
    assert router_documents.current_documents() is None
    assert CLOCK._set is None


def test_reserve_ranks_are_refused_by_flag():
    args = argparse.Namespace(inprocess_restart=True, inprocess_active_world_size=6, world_size=8)
    problems = combinations.problems_with_restarts(args)
    assert any("--inprocess-active-world-size" in problem for problem in problems)
    args.inprocess_active_world_size = 8
    problems = combinations.problems_with_restarts(args)
    assert not any("--inprocess-active-world-size" in problem for problem in problems)
