"""The pools a checkpoint says it was trained with."""

from __future__ import annotations

import argparse
from unittest import mock

import pytest

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import resume as checkpoint

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
