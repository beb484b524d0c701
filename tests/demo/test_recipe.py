"""The demo's models differ in what they compare and in nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from demo import recipe
from emo_megatron.commands import retention
from emo_megatron.config import PoolConfig
from emo_megatron.experts.select import parse_keep
from emo_megatron.mcore.args import add_pool_args, pool_config_from_args


def _flags(model, size=recipe.FULL):
    return recipe.megatron_flags(size, model, corpus=Path("corpus"), run_dir=Path("run"))


def _pool(model, size=recipe.FULL):
    parser = add_pool_args(argparse.ArgumentParser(allow_abbrev=False))
    return pool_config_from_args(parser.parse_known_args(_flags(model, size))[0])


def test_the_three_models_differ_in_experts_and_pools_only():
    models = {m.name: m for m in recipe.main_models(recipe.FULL, seed=1)}
    common = _flags(models["emo"])[: -len(models["emo"].flags)]
    for model in models.values():
        assert _flags(model) == [*common, *model.flags]
    assert models["standard"].flags == ("--num-experts", str(recipe.FULL.experts))
    assert models["small"].flags == ("--num-experts", str(recipe.FULL.experts // 4))
    assert models["emo"].flags[:2] == models["standard"].flags
    assert len({m.seed for m in models.values()}) == 1


@pytest.mark.parametrize("size", [recipe.FULL, recipe.QUICK])
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


@pytest.mark.parametrize(
    "size", [recipe.FULL, dataclasses.replace(recipe.FULL, shared_hidden=100, flags=("--bf16", "--swiglu"))]
)
def test_modules_keep_the_fractions_of_the_routed_experts(size, tmp_path):
    model = recipe.main_models(size, seed=1)[0]
    flags = recipe.retention_flags(size, model, corpus=tmp_path, run_dir=tmp_path / "emo")
    options = tyro.cli(retention.Options, args=flags)
    shape = {"num_experts": size.experts, "top_k": size.top_k}
    kept = [parse_keep(text, **shape) for text in options.keep]
    assert kept == [size.experts * fraction for fraction in size.fractions]
    assert (options.megatron_args or "").split() == list(size.flags)
    assert [parse_keep(text, **shape) for text in options.cross_sizes] == [size.experts // 4]


def test_ablations_see_as_many_tokens_a_step():
    for model in recipe.extra_models(recipe.FULL, seed=1):
        flags = _flags(model)
        last = {flags[i]: flags[i + 1] for i in range(len(flags) - 1)}
        tokens = int(last["--global-batch-size"]) * int(last["--seq-length"])
        assert tokens == recipe.FULL.rows * recipe.FULL.seq_length, model.name


def test_a_folder_of_text_is_a_corpus_of_its_own(tmp_path):
    options = tyro.cli(recipe.Options, args=["--corpus", str(tmp_path), "--output", str(tmp_path / "mine"), "--quick"])
    recipe.plan(options)
    assert json.loads((tmp_path / "mine" / "demo.json").read_text())["corpus"] == str(tmp_path)
    with pytest.raises(ValueError, match=r"corpus.*--output"):
        recipe.plan(dataclasses.replace(options, corpus=None))


def test_a_folder_of_another_run_is_refused_by_what_differs(tmp_path):
    first = recipe.Options(output=tmp_path / "a run", quick=True)
    known = recipe.plan(first)
    assert recipe.plan(first) == known
    assert known["models"].split() == ["emo", "standard", "small"]
    flags = (tmp_path / "a run" / "emo" / "train.flags").read_text().split("\0")
    assert flags[flags.index("--data-path") + 1] == str(tmp_path / "a run" / "corpus" / "train")
    with pytest.raises(ValueError, match=r"seed is 1234 there and 1 here.*--output"):
        recipe.plan(dataclasses.replace(first, seed=1))


@pytest.mark.parametrize(
    ("changed", "flag"), [({"processes": 0}, "--processes"), ({"seed": 0}, "--seed"), ({"seed": 2**31}, "--seed")]
)
def test_options_that_cannot_be_are_refused(changed, flag):
    with pytest.raises(ValueError, match=flag):
        recipe.Options(**changed)
