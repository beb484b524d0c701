"""`python -m emo_megatron bridge`: what it refuses before there is a process group, what it lists, that it trains."""

from __future__ import annotations

import json
import re
import sys

import pytest

SMALL = ["--recipe", "support.bridge_command:small_olmoe"]
WITH_MTP = ["--recipe", "support.bridge_command:with_mtp"]
UNSAVED = ["checkpoint.save=null", "checkpoint.load=null"]

REFUSED = {
    "no recipe": ([], "--recipe"),
    "unknown name": (["--recipe", "olmoe_7b_pretran_config", "model.pool_min=8"], "--recipe"),
    "no such module": (["--recipe", "no_such_module:recipe", "model.pool_min=8"], "no_such_module"),
    "no such function": (["--recipe", "support.bridge_command:lost", "model.pool_min=8"], "'lost'"),
    "arguments": (["--recipe", "support.bridge_command:needs_arguments", "model.pool_min=8"], "requires size"),
    "no config": (["--recipe", "support.bridge_command:returns_nothing", "model.pool_min=8"], "NoneType"),
    "no pool_min": ([*SMALL, "train.train_iters=1"], "model.pool_min"),
    "unknown pool field": ([*SMALL, "model.pool_min=3", "model.pool_mni=2"], "pool_mni"),
    "wrong kind": ([*SMALL, "model.pool_min=many"], "pool_min"),
    "wrong value": ([*SMALL, "model.pool_min=3", "model.pool_max=2"], "model.pool_max"),
    "no value": ([*SMALL, "model.pool_min"], "model.pool_min"),
    "two values": ([*SMALL, "model.pool_min=3,4"], "model.pool_min=3,4"),
    "below top-k": ([*SMALL, "model.pool_min=1"], "model.pool_min"),
    "above the experts": ([*SMALL, "model.pool_min=9"], "model.pool_min"),
    "unknown field": ([*SMALL, "model.pool_min=3", "train.train_itres=1"], "train_itres"),
    "of the model": (
        [*SMALL, "model.pool_min=3", "model.moe_expert_capacity_factor=1.1"],
        "model.moe_expert_capacity_factor",
    ),
    "another program's flag": ([*SMALL, "--pool-min", "8"], "model.pool_min=VALUE"),
    "without model": ([*SMALL, "pool_min=8"], "model.pool_min=VALUE"),
    "none": ([*SMALL, "model.pool_min=3", "model.pool_eval=none"], "model.pool_eval=null"),
    "added once": ([*SMALL, "model.pool_min=3", "+model.pool_max=4"], "+model.pool_max=4"),
    "added": ([*SMALL, "model.pool_min=3", "++model.pool_max=4"], "++model.pool_max=4"),
    "strict": ([*SMALL, "--strict", "model.pool_min=3", "model.moe_router_dtype=null"], "model.moe_router_dtype"),
    "other pools": ([*SMALL, "model.pool_min=3"], "model.pool_min was 4 and is 3"),
    "other pools at a step": ([*SMALL, "model.pool_min=3", "checkpoint.ckpt_step=2"], "model.pool_min was 5 and is 3"),
}
ACCEPTED = {
    "list": ["--list"],
    "train": [
        *(*WITH_MTP, "model.pool_documents=attention", *UNSAVED),
        *("model.pool_min=3", "model.pool_max=3", "model.pool_eval=2"),
        *("train.train_iters=1", "validation.eval_interval=1", "validation.eval_iters=1"),
    ],
}
CALLS = {name: argv for name, (argv, _) in REFUSED.items()} | ACCEPTED


@pytest.fixture(scope="module")
def answers(run_bridge, tmp_path_factory):
    """Of each call: exit status, what was printed, what was said on stderr, and whether a process group existed.

    The folder that recipes save into has two checkpoints of a run with other pools.
    """
    folder = tmp_path_factory.mktemp("bridge")
    for step, pool_min in ((2, 5), (4, 4)):
        saved = folder / f"iter_{step:07d}"
        saved.mkdir()
        (saved / "run_config.yaml").write_text(f"model: {{pool_min: {pool_min}}}")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    printed = run_bridge("-m", "support.bridge_command", "answers", json.dumps(CALLS), FOLDER=str(folder))
    lines = [line for line in printed.splitlines() if line.startswith('{"no recipe"')]
    return json.loads(lines[0])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_error_that_names_it(answers, name):
    status, _, said, is_initialized = answers[name]
    assert status == 2
    assert "Traceback" not in said
    assert said.startswith("error: ")
    assert REFUSED[name][1] in said
    assert not is_initialized


def test_an_unknown_name_brings_the_nearest(answers):
    assert "did you mean olmoe_7b_pretrain_config?" in answers["unknown name"][2]


def test_the_list_holds_moe_recipes_on_text(answers):
    names = answers["list"][1].split()
    assert names == sorted(set(names))
    families = ("olmoe", "qwen3_30b", "qwen3_235b", "deepseek_v2", "deepseek_v3", "kimi", "moonlight")
    assert all(any(family in name for name in names) for family in families)
    assert {"olmoe_7b_pretrain_config", "qwen35_text_35b_a3b_pretrain_config"} <= set(names)
    dense_or_not_text = ("llama", "_vl_", "qwen35_text_9b", "wan", "_sft_", "_peft_")
    assert not [name for name in names if any(word in name for word in dense_or_not_text)]


def test_a_recipe_trains_with_the_pools_of_the_command_line(answers):
    status, printed, said, _ = answers["train"]
    assert status == 0, said
    assert re.findall(r"pool_size: ([\d.]+)", printed) == ["3.00"]
    (advice,) = (line for line in printed.splitlines() if " stays " in line)
    # 0.1 / 2 layers
    assert re.search(r"^emo_megatron: .* stays seq_aux_loss; .*global_aux_loss .*coeff=0\.05 ", advice)
    assert re.search(r"iteration\s+1/\s+1 .*lm loss: [56]\.", printed)
    assert re.search(r"validation loss at iteration 1\b.*lm loss value: [56]\.", printed)
    assert "results:" not in printed


@pytest.mark.slow
def test_ranks_of_torchrun_train_save_and_resume(start_bridge, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    words = ["bridge", *SMALL, "model.pool_min=3", "model.expert_model_parallel_size=2"]

    def run(*overrides):
        return start_bridge(*torchrun, "support.bridge_command", *words, *overrides, FOLDER=str(tmp_path))

    first = run("train.micro_batch_size=1")
    assert first.count(f"results: {tmp_path}") == 1
    assert first.count("emo_megatron: dataset.inter_document_masking") == 1
    assert (tmp_path / "iter_0000002" / "run_config.yaml").is_file()
    second = run("train.micro_batch_size=1", "train.train_iters=3")
    assert re.findall(r"iteration\s+(\d+)/", second) == ["3"]
    assert re.search(r"pool_size: [\d.]+", second)
