"""The launchers in examples/: every flag parses, none is refused, the model is the paper's."""

import argparse
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.pretraining import FLAGS

from emo_megatron.config import PoolConfig

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LAUNCHERS = sorted(EXAMPLES.glob("*.sh"))
INPUTS = {"DATA_PATH": "0.7 web 0.3 code", "TOKENIZER": "tokenizer", "CHECKPOINT": "runs/model"}


def _launch(tmp_path: Path, script: str, *flags: str, **variables: str) -> list[str]:
    """What a launcher would have run, one word an item, the interpreter left out."""
    fake_python = tmp_path / "python"
    fake_python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    fake_python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(EXAMPLES / script), *flags],
        env={"PATH": os.environ["PATH"], "PYTHON": str(fake_python), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def _flags_of(words: list[str]) -> list[str]:
    return words[words.index(str(EXAMPLES / "pretrain_emo.py")) + 1 :]


def _validated(flags: list[str], monkeypatch: pytest.MonkeyPatch, *, world_size: int) -> argparse.Namespace:
    """Parse and check flags as Megatron does on the first of many H100s."""
    from megatron.training.arguments import parse_args, validate_args

    from emo_megatron.mcore.args import add_pool_args

    monkeypatch.setattr("sys.argv", ["pretrain_emo.py", *flags])
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=9, minor=0))
    args = parse_args(add_pool_args)
    validate_args(args)
    return args


@pytest.mark.parametrize("script", [path.name for path in LAUNCHERS])
def test_launchers_have_no_syntax_errors(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(EXAMPLES / script)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(EXAMPLES / script, os.X_OK)


@pytest.mark.parametrize(
    ("script", "experts", "data_parallel_size"), [("emo_1b14b.sh", 127, 64), ("emo_1b14b_ep.sh", 128, 128)]
)
def test_flags_say_the_papers_model(
    script: str, experts: int, data_parallel_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    from emo_megatron.mcore.args import check_run, pool_config_from_args

    flags = _flags_of(_launch(tmp_path, script, **INPUTS))
    args = _validated(flags, monkeypatch, world_size=128)
    pool = pool_config_from_args(args)
    args.apply_rope_fusion = False  # needs Transformer Engine to be there
    config = core_transformer_config_from_args(args)
    check_run(pool, config, args)

    assert config.num_moe_experts == experts
    assert (pool.pool_min, pool.pool_max, pool.pool_eval) == (8, None, None)
    assert pool.size_bounds(num_experts=experts, consumed_samples=0) == (8, experts)
    assert args.data_path == ["0.7", "web", "0.3", "code"]
    assert args.data_parallel_size == data_parallel_size
    assert args.global_batch_size * args.seq_length == 4_194_304
    assert args.train_iters * args.global_batch_size * args.seq_length == pytest.approx(1e12, rel=1e-4)
    assert args.params_dtype is torch.bfloat16
    assert args.accumulate_allreduce_grads_in_fp32
    assert args.lr_decay_iters in (None, args.train_iters)
    assert args.min_lr == pytest.approx(args.lr / 10)
    assert config.moe_aux_loss_coeff == pytest.approx(0.1 / config.num_layers)
    assert config.moe_z_loss_coeff == pytest.approx(1e-3 / config.num_layers)
    expected = {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "kv_channels": 128,
        "moe_ffn_hidden_size": 1024,
        "moe_shared_expert_intermediate_size": 1024,
        "moe_router_topk": 7,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": False,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.02,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert _count_parameters(config, vocabulary=100_352) == pytest.approx(13.6e9, rel=0.01)


@pytest.mark.parametrize("script", ["emo_1b14b.sh", "emo_1b14b_ep.sh"])
def test_one_flag_gives_the_matched_standard_moe(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from emo_megatron.mcore.args import pool_config_from_args

    flags = _flags_of(_launch(tmp_path, script, "--pool-min", "none", **INPUTS))
    assert not pool_config_from_args(_validated(flags, monkeypatch, world_size=128)).is_on


def _count_parameters(config: object, *, vocabulary: int) -> int:
    attention = 4 * config.hidden_size**2
    expert = 3 * config.hidden_size * config.moe_ffn_hidden_size
    router = config.hidden_size * config.num_moe_experts
    layer = attention + (config.num_moe_experts + 1) * expert + router
    return config.num_layers * layer + 2 * vocabulary * config.hidden_size


def test_the_preset_of_the_megatron_page_is_olmos_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import core_transformer_config_from_args

    from emo_megatron.mcore.args import check_run, pool_config_from_args
    from emo_megatron.ops import pool_topk

    page = (ROOT / "docs" / "megatron.md").read_text()
    preset = re.search(r"### OLMo 3.5's variant\n.*?```bash\n(.*?)```", page, flags=re.DOTALL)
    assert preset is not None
    flags = [*FLAGS, *shlex.split(preset[1].replace("\\\n", " "))]
    args = _validated([*flags, "--vocab-size", "512"], monkeypatch, world_size=1)
    pool = pool_config_from_args(args)
    args.apply_rope_fusion = False
    config = core_transformer_config_from_args(args)
    check_run(pool, config, args)

    assert pool == PoolConfig(pool_min=16, pool_mask="selection")
    assert pool.size_bounds(num_experts=config.num_moe_experts, consumed_samples=0) == (16, 512)
    logits_TE = torch.randn(50, 512)
    pool_DE = torch.rand(1, 512) < 0.1
    routed = pool_topk(
        logits_TE,
        document_ids_T=torch.zeros(50, dtype=torch.int64),
        pool_DE=pool_DE,
        top_k=config.moe_router_topk,
        score_function=config.moe_router_score_function,
        pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        mask=pool.pool_mask,
    )
    scores_TE = logits_TE.softmax(-1)
    chosen_TK = scores_TE.masked_fill(~pool_DE, 0.0).topk(16).indices
    weights_TK = scores_TE.gather(1, chosen_TK)
    weights_TK = 16 * weights_TK / weights_TK.sum(1, keepdim=True)
    wanted_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, weights_TK)
    torch.testing.assert_close(routed.probs_TE, wanted_TE)
    torch.testing.assert_close(routed.score_sums_E, scores_TE.sum(0))


def test_the_users_flags_and_variables_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = _launch(
        tmp_path, "emo_1b14b_ep.sh", *("--lr", "1e-3"), EP="4", TRAIN_ITERS="30995", MICRO_BATCH="2", NPROC="8"
    )
    assert "--standalone" in words
    assert words[words.index("--nproc-per-node") + 1] == "8"
    args = _validated(_flags_of(words), monkeypatch, world_size=8)
    assert args.lr == 1e-3
    assert args.expert_model_parallel_size == 4
    assert args.train_iters == 30995
    assert args.micro_batch_size == 2
    assert args.save is None


def test_several_nodes_need_to_know_each_other(tmp_path: Path) -> None:
    words = _launch(tmp_path, "pretrain_emo.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="first", NPROC="4")
    assert words[words.index("--nnodes") :][:8] == [
        *("--nnodes", "2", "--node-rank", "1"),
        *("--master-addr", "first", "--master-port", "29500"),
    ]
    assert "--standalone" not in words
    with pytest.raises(subprocess.CalledProcessError) as failure:
        _launch(tmp_path, "pretrain_emo.sh", NNODES="2", NODE_RANK="1")
    assert "MASTER_ADDR" in failure.value.stderr
