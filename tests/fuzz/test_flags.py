"""The flags that training adds to Megatron's: a configuration that holds, or one line that names flag or file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from fuzz.judge import both_sizes, check_line, fuzz
from fuzz.test_options import arguments, kinds_of
from hypothesis import strategies as st

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore.args import add_pool_args, pool_config_from_args
from emo_megatron.mcore.finetune import TrainOnly
from emo_megatron.runners.start import add_start_args, start_hooks

TRAINING = {
    "load": ("megatron", "missing", "qwen2_moe", None),
    "pretrained_checkpoint": (None, "megatron", "missing"),
    "ckpt_step": (None, 7),
    "finetune": (True, False),
    "no_save_optim": (True, None),
    "num_experts": (4, 8, None),
    "expert_model_parallel_size": (2, 1),
}
"""What Megatron's own flags may say."""


def _argv_of(pool: PoolConfig) -> list[str]:
    """The flags that say this configuration."""
    given = {f.name: getattr(pool, f.name) for f in dataclasses.fields(pool) if getattr(pool, f.name) != f.default}
    return [flag(name) if value is True else f"{flag(name)}={value}" for name, value in given.items()]


@both_sizes
def test_flags(inputs: int, valid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(valid)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_start_args(add_pool_args(parser))
    kinds = kinds_of(PoolConfig) | {
        "--train-only": TrainOnly,
        "--train-selection": Path,
        "--expert-placement": Path,
        "--override-pool-config": bool,
    }
    host = st.fixed_dictionaries({name: st.sampled_from(found) for name, found in TRAINING.items()})

    def one(found: tuple[list[str], dict[str, Any]]) -> None:
        argv, host = found
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                args = parser.parse_args(argv, argparse.Namespace(**host))
        except SystemExit:
            args = None
        if args is None:
            line = told.getvalue().rpartition("error: ")[2]
            assert "-h" in argv or "--help" in argv or "--" in line or "stray" in line
            return
        try:
            pool = pool_config_from_args(args)
            problems = pool.problems_with_model(num_experts=8, top_k=2)
            assert all("--" in problem for problem in problems)
            start_hooks(args)
        except (OSError, ValueError) as error:
            check_line(str(error), named=["--", *(v for a in argv for v in a.split("=", 1) if v)])
            return
        again = parser.parse_args(_argv_of(pool))
        assert pool_config_from_args(again) == pool

    # a number where there is no none
    known = [
        (["--pool-min", "2", flag, "none"], dict.fromkeys(TRAINING))
        for flag in ("--pool-unrestricted", "--pool-min-decay-samples", "--pool-seed")
    ]
    fuzz(inputs, st.tuples(arguments("--pool-min 2", kinds), host), one, known=known)
