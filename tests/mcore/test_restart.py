"""--inprocess-restart: an attempt after a failure is the run from its start, metrics included."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from support.pretraining import logged, pretrain

from emo_megatron.mcore import combinations, resume, router_documents
from emo_megatron.mcore.context import CLOCK

STAND_INS = Path(__file__).resolve().parents[1] / "support" / "stand_ins"


@pytest.mark.slow
def test_a_run_that_starts_over_repeats_its_steps(data_prefix, monkeypatch):
    paths = [str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    flags = ["--pool-min", 3, "--inprocess-restart", "--inprocess-active-world-size", 1]
    output = pretrain(1, *flags, data=data_prefix)
    for name in ("lm loss", "pool_size", "experts_per_document", "global_load_balancing_loss"):
        values = logged(output, name)
        # two steps before the failure, then all four
        assert len(values) == 6, name
        assert values[:2] == values[2:4], name


def test_nothing_of_an_attempt_is_kept():
    CLOCK.consumed_samples = 8
    router_documents.forward_with_documents(lambda: None, documents := object())
    assert router_documents.current_documents() is documents
    resume.forget_attempt()
    assert router_documents.current_documents() is None
    assert CLOCK._set is None


def test_reserve_ranks_are_refused_by_flag():
    args = argparse.Namespace(inprocess_restart=True, inprocess_active_world_size=6, world_size=8)
    problems = combinations.problems_with_restarts(args)
    assert any("--inprocess-active-world-size" in problem for problem in problems)
    args.inprocess_active_world_size = 8
    problems = combinations.problems_with_restarts(args)
    assert not any("--inprocess-active-world-size" in problem for problem in problems)
