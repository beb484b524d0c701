"""A module's life in real training runs: cut out, trained by stock Megatron or the launcher, put back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import pretraining
from support.checkpoints import selection_of

from emo_megatron.checkpoint.names import EXPERTS, split_name
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.cli import main

KEPT = [[0, 2, 4, 5], [1, 2, 3, 7], [0, 1, 6, 7]]


def _run(*command):
    assert main([str(part) for part in command]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_prefix):
    """A run's checkpoint and a module cut out of it: parent/, module/."""
    folder = tmp_path_factory.mktemp("life")
    save = ("--train-iters", 1, "--save-interval", 1, "--save", folder / "parent")
    pretraining.pretrain(1, "--pool-min", 3, *save, data=data_prefix)
    selection = selection_of(folder / "parent", KEPT).save(folder / "kept.json")
    chosen = ("--checkpoint", folder / "parent", "--selection", selection)
    _run("extract", *chosen, "--output", folder / "module")
    return folder


@pytest.mark.slow
def test_stock_megatron_trains_and_resumes_it_under_another_layout(folder, data_prefix):
    def run(source, *flags):
        return pretraining.pretrain(
            *(2, "--num-experts", 4, "--expert-model-parallel-size", 2, "--load", source),
            *("--save", folder / "further", "--save-interval", 1, "--train-iters", 2),
            *flags,
            data=data_prefix,
            script=pretraining.ROOT / "tests" / "support" / "pretrain_stock.py",
        )

    first = run(folder / "module", "--exit-interval", 1)
    assert "loading release distributed checkpoint" in first
    resumed = run(folder / "further")
    assert "at iteration 1" in resumed
    assert [len(pretraining.logged(output)) for output in (first, resumed)] == [1, 1]
    assert MegatronCheckpoint(folder / "further").args.num_experts == 4


def test_the_launcher_trains_its_experts_and_merge_puts_them_back(folder, data_prefix):
    environment = {"MODULE": folder / "module", "OUTPUT": folder / "tuned", "STEPS": 2}
    environment |= {"DATA_PATH": data_prefix, "PYTHON": sys.executable, "PYTHONPATH": pretraining.ROOT}
    script = pretraining.ROOT / "examples" / "finetune_module.sh"
    # what the launcher sets itself would win if it came again
    flags = list(pretraining.FLAGS)
    for name in ("--train-iters", "--lr", "--min-lr"):
        del flags[flags.index(name) : flags.index(name) + 2]
    flags += ["--vocab-size", pretraining.VOCAB, "--num-experts", 4]
    flags += ["--data-cache-path", data_prefix.parent]
    run = subprocess.run(
        [str(part) for part in ("bash", script, *flags)],
        env=os.environ | {k: str(v) for k, v in environment.items()} | {"EMO_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    parts = ("--parent", folder / "parent", "--modules", folder / "tuned")
    _run("merge", *parts, "--output", folder / "merged")
    before, after = (MegatronCheckpoint(folder / name) for name in ("parent", "merged"))
    for name in before.names:
        layer, rest = split_name(name, num_layers=4)
        rows = (before.read(name) != after.read(name)).flatten(1 if rest.startswith(EXPERTS) else 0)
        changed = rows.any(dim=1).nonzero().flatten().tolist() if rows.dim() > 1 else rows.any()
        assert changed == (KEPT[layer - 2] if rest.startswith(EXPERTS) else torch.tensor(False))
