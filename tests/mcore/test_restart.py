"""--inprocess-restart: an attempt after a failure is the run from its start, metrics included."""

from __future__ import annotations

import os
from pathlib import Path

from support.pretraining import logged, pretrain

STAND_INS = Path(__file__).resolve().parents[1] / "support" / "stand_ins"


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
