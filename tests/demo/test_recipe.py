"""The demo's models differ in what they compare and in nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import signal
from pathlib import Path

import pytest

from emo_megatron import processes
from emo_megatron.checkpoint.reader import num_shared_experts
from emo_megatron.config import PoolConfig
from emo_megatron.demo import jobs, recipe, run
from emo_megatron.demo.corpus import Corpus
from emo_megatron.experts.select import parse_keep
from emo_megatron.experts.stats import ModelFacts
from emo_megatron.mcore.args import add_pool_args, pool_config_from_args


def _flags(model, size=recipe.FULL):
    return recipe.megatron_flags(size, model, tokenizer=Path("tok"), data_prefix=Path("data"), run_dir=Path("run"))


def _pool(model, size=recipe.FULL):
    parser = add_pool_args(argparse.ArgumentParser(allow_abbrev=False))
    return pool_config_from_args(parser.parse_known_args(_flags(model, size))[0])


def test_the_three_models_differ_in_experts_and_pools_only():
    models = {m.name: m for m in recipe.main_models(recipe.FULL, seed=1)}
    common = _flags(models["emo"])[: -len(models["emo"].flags)]
    for model in models.values():
        assert _flags(model) == [*common, *model.flags]
    assert models["standard"].flags == ("--num-experts", "32")
    assert models["small"].flags == ("--num-experts", "8")
    assert models["emo"].flags[:2] == models["standard"].flags
    assert len({m.seed for m in models.values()}) == 1


@pytest.mark.parametrize("size", [recipe.FULL, recipe.QUICK, recipe.ON_GPU, recipe.ON_GPU_QUICK])
def test_every_pool_configuration_is_valid(size):
    everything = [*recipe.main_models(size, seed=1), *recipe.extra_models(size, seed=1)]
    pools = {m.name: _pool(m, size) for m in everything}
    assert pools["standard"] == pools["small"] == PoolConfig()
    for name, pool in pools.items():
        assert not pool.problems_with_model(num_experts=size.experts, top_k=size.top_k), name
        assert pool.is_on == name.startswith("emo"), name
    assert pools["emo"].size_bounds(num_experts=size.experts, consumed_samples=size.steps * size.rows) == (
        size.pool_min,
        size.experts,
    )
    assert pools["emo-ignores-boundaries"].pool_scope == "sample"


@pytest.mark.parametrize("size", [recipe.ON_GPU, recipe.ON_GPU_QUICK])
def test_a_step_of_several_micro_batches_balances_over_them(size):
    assert size.rows % size.rows_at_once == 0 < size.rows - size.rows_at_once
    emo, *others = recipe.main_models(size, seed=1)
    assert _pool(emo, size).pool_balance == "running"
    for model in (emo, *others):
        flags = _flags(model, size)
        given = dict(itertools.pairwise(flags))
        assert given["--micro-batch-size"] == str(size.rows_at_once)
        assert given["--global-batch-size"] == str(size.rows)
        assert given["--transformer-impl"] == "local"
        assert "--bf16" in flags


def test_fewer_steps_shorten_every_schedule():
    size = dataclasses.replace(recipe.ON_GPU, steps=200)
    emo = recipe.main_models(size, seed=1)[0]
    flags = dict(itertools.pairwise(_flags(emo, size)))
    assert flags["--train-iters"] == "200"
    assert int(flags["--lr-warmup-iters"]) == 50 < recipe.ON_GPU.warmup
    assert _pool(emo, size).pool_min_decay_samples == 120 * size.rows
    assert size.tokens == 200 * 128 * 1024


@pytest.mark.parametrize("size", [recipe.FULL, recipe.ON_GPU])
def test_modules_keep_the_fractions_of_the_routed_experts(size, tmp_path):
    model = recipe.main_models(size, seed=1)[0]
    corpus = Corpus(path=tmp_path, manifest={})
    options = run.retention_options(model, size, corpus=corpus, output=tmp_path)
    facts = ModelFacts(
        fingerprint="f00d",
        num_experts=size.experts,
        num_shared=num_shared_experts(
            argparse.Namespace(
                moe_ffn_hidden_size=size.expert_hidden, moe_shared_expert_intermediate_size=size.shared_hidden
            )
        ),
        top_k=size.top_k,
        layers=(1,),
        expert_parameters=1,
        other_parameters=1,
    )
    kept = [parse_keep(text, facts) for text in options.keep]
    assert kept == [size.experts * fraction for fraction in size.fractions]
    assert options.megatron.split() == list(size.flags)


def test_ablations_see_as_many_tokens_a_step():
    for model in recipe.extra_models(recipe.FULL, seed=1):
        flags = _flags(model)
        last = {flags[i]: flags[i + 1] for i in range(len(flags) - 1)}
        tokens = int(last["--global-batch-size"]) * int(last["--seq-length"])
        assert tokens == recipe.FULL.rows * recipe.FULL.seq_length, model.name


def _job(tmp_path, name, code, total=2):
    marker = tmp_path / f"{name}.done"
    return jobs.Job(
        title=name,
        command=["python3", "-c", code.format(marker=marker)],
        log=tmp_path / f"{name}.log",
        total=total,
        done=lambda: 1,
        is_finished=marker.exists,
    )


WRITE = "open('{marker}', 'w').write('x'); print('hello')"


def test_chains_run_in_order_and_finished_jobs_are_skipped(tmp_path):
    first, second = _job(tmp_path, "first", WRITE), _job(tmp_path, "second", WRITE)
    (tmp_path / "first.done").write_text("earlier")
    jobs.run_chains([[first, second]], at_once=2)
    assert (tmp_path / "first.done").read_text() == "earlier"
    assert (tmp_path / "second.log").read_text() == "hello\n"


def test_a_failure_shows_the_log_and_stops_the_others(tmp_path, monkeypatch):
    started = []

    def start(*arguments, **options):
        started.append(processes.start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(jobs, "start", start)
    slow = _job(tmp_path, "slow", "import time; time.sleep(60)")
    bad = _job(tmp_path, "bad", "raise SystemExit('it broke')")
    with pytest.raises(RuntimeError, match=r"bad failed with exit code 1(.|\n)*it broke"):
        jobs.run_chains([[slow], [bad]], at_once=2)
    assert [process.returncode for process in started] == [-signal.SIGTERM, 1]


def test_the_last_iteration_is_read_from_megatrons_log(tmp_path):
    log = tmp_path / "log"
    assert jobs.last_iteration(log) == 0
    log.write_text(" iteration        5/     700 | x\n iteration       10/     700 | consumed\n")
    assert jobs.last_iteration(log) == 10
