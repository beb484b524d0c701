"""Flags and refusals: one clear error before anything is built."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
from unittest import mock

import pytest

from emo_megatron.config import PoolConfig, flag
from emo_megatron.mcore import args as pool_args
from emo_megatron.mcore import combinations
from emo_megatron.mcore.unsupported import HOST, MODEL, SCRIPT


def _parse(*argv: str) -> argparse.Namespace:
    return pool_args.add_pool_args(argparse.ArgumentParser()).parse_args(argv)


def test_defaults_are_off_and_every_field_is_a_flag():
    assert pool_args.pool_config_from_args(_parse()) == PoolConfig()


def test_none_can_be_said_where_a_number_may_lack(capsys):
    assert _parse("--pool-eval", "none").pool_eval is None
    with pytest.raises(SystemExit):
        _parse("--pool-seed", "none")
    assert "--pool-seed" in capsys.readouterr().err


def test_flags_make_the_configuration():
    parsed = _parse(
        *("--pool-min", "8", "--pool-max", "100", "--pool-eval", "none", "--pool-mask", "selection"),
        *("--pool-unrestricted", "0.5", "--pool-forced", "2", "--pool-balance", "running"),
        "--pool-eos-starts-document",
    )
    config = pool_args.pool_config_from_args(parsed)
    assert config == PoolConfig(
        pool_min=8,
        pool_max=100,
        pool_mask="selection",
        pool_unrestricted=0.5,
        pool_forced=2,
        pool_balance="running",
        pool_eos_starts_document=True,
    )


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit):
        _parse("--help")
    text = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(PoolConfig) if flag(field.name) not in text] == []


def test_conversations_go_with_what_their_dataset_takes():
    talk = {"sft": True, "tokenizer_type": "SFTTokenizer"}
    pools = PoolConfig(pool_min=4)
    fine = host_options(**talk)
    pool_args.check_run(pools, fine, fine)
    with pytest.raises(ValueError, match="--sft must not be given"):
        pool_args.check_run(pools, fine, fine, rows=HOST)
    with pytest.raises(ValueError, match="--sft must not be given with --pool-documents routers"):
        pool_args.check_run(PoolConfig(pool_min=4, pool_documents="routers"), fine, fine)
    wrong = {"context_parallel_size": 2, "mock_data": True, "reset_position_ids": True}
    host = host_options(**talk | wrong | {"tokenizer_type": "NullTokenizer"})
    with pytest.raises(ValueError, match="with --sft") as caught:
        pool_args.check_run(pools, host, host)
    for name in (*wrong, "tokenizer_type"):
        assert f"--{name.replace('_', '-')} must " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"save": "runs/it"}, "--no-save-optim"),
        ({"load": "runs/it"}, "--load"),
        ({"save": "runs/it", "no_save_optim": True}, None),
        ({"load": "runs/it", "no_load_optim": True}, None),
        ({"load": "runs/it", "finetune": True}, None),
        ({"save": "runs/it", "data_parallel_size": 1}, None),
        ({"save": "runs/it", "data_parallel_sharding_strategy": "no_shard"}, None),
        ({"save": "runs/it", "use_megatron_fsdp": False}, None),
        ({"save": "runs/it", "is_torchs": False}, None),
        ({}, None),
    ],
)
def test_a_checkpoint_that_would_never_end_is_refused(change, flag):
    change = {"use_megatron_fsdp": True, "is_torchs": True} | change
    is_torchs = change.pop("is_torchs")
    host = host_options(**change)
    refused = pytest.raises(ValueError, match=f"{flag} .*--use-megatron-fsdp")
    outcome = refused if flag else contextlib.nullcontext()
    with mock.patch.object(combinations, "USING_PYTORCH_OPTIMIZER", is_torchs), outcome:
        pool_args.check_run(PoolConfig(), host, host)


def host_options(**overrides):
    """The attributes of a host configuration the refusals read, all allowed."""
    allowed = {r.field: r.allowed[0] for r in (*MODEL, *SCRIPT)}
    allowed |= {
        "num_moe_experts": 32,
        "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_enable_expert_bias": False,
        **dict.fromkeys(("moe_router_num_groups", "moe_router_group_topk", "moe_latent_size")),
        "dataloader_inter_document_masking": True,
        "micro_batch_size": 2,
        "eval_micro_batch_size": 2,
        "tensor_model_parallel_size": 1,
        "sequence_parallel": False,
        "seq_length": 64,
        "world_size": 8,
        "inprocess_active_world_size": 8,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "overlap_moe_expert_parallel_comm": False,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "moe_flex_dispatcher_backend": "deepep",
        "moe_hybridep_pad_uneven_dispatch_inputs": False,
        "mtp_num_layers": None,
        "max_documents": None,
        "transformer_impl": "local",
        "position_embedding_type": "rope",
        "hierarchical_context_parallel_sizes": None,
        "cp_comm_type": ["p2p"],
        "moe_token_dispatcher_type": "alltoall",
        "dataloader_type": "single",
        "sft": False,
        "mock_data": False,
        "reset_position_ids": False,
        "inprocess_restart": False,
        "use_megatron_fsdp": False,
        "data_parallel_size": 8,
        "data_parallel_sharding_strategy": "optim_grads_params",
        "finetune": False,
        **dict.fromkeys(("save", "no_save_optim", "load", "no_load_optim")),
    }
    return types.SimpleNamespace(**(allowed | overrides))


REFUSED = {
    "moe_router_load_balancing_type": ["sinkhorn", "quantile_balancing"],
    "moe_router_dtype": [None, "fp64"],
    "moe_router_score_function": ["tanh"],
    "moe_router_topk_limited_devices": [2],
    "moe_router_force_load_balancing": [True],
    "moe_router_force_biased": [0.1],
    "moe_enable_routing_replay": [True],
    "moe_expert_capacity_factor": [1.0],
    "mlp_chunks_for_training": [2],
    "cuda_graph_impl": ["local", "transformer_engine"],
    "transformer_impl": ["inference_optimized"],
    "fim_data": [True],
    "logits_load_dir": ["teacher"],
    "spec": [["a", "b"]],
    "hybrid_context_parallel": [True],
    "heterogeneous_layers_config_path": ["layers.json"],
    "reset_attention_mask": [True],
}


POOLS, OFF = PoolConfig(pool_min=4), PoolConfig()
ROUTERS = PoolConfig(pool_min=4, pool_documents="routers", pool_balance="running")
LOSSES = ["global_aux_loss", "seq_aux_loss"]
TWO_LOSSES = {"moe_router_load_balancing_type": LOSSES, "moe_aux_loss_coeff": [0.1, 0.01]}
SINKHORN = {"moe_router_load_balancing_type": [*LOSSES, "sinkhorn"], "moe_aux_loss_coeff": [0.1, 0.01, 0.0]}
UNPACKED = {"dataloader_inter_document_masking": False}
INTERLEAVED = {"virtual_pipeline_model_parallel_size": 2}
PLANNED = INTERLEAVED | {"overlap_moe_expert_parallel_comm": True}
CUT = {"context_parallel_size": 2, "mtp_num_layers": 1}
POSITIONS = {"mtp_num_layers": 1, "position_embedding_type": "learned_absolute", "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("pool", "host", "rows", "flag"),
    [
        (POOLS, {}, SCRIPT, None),
        # boundaries for the routers alone take what packed ones do not
        (ROUTERS, UNPACKED | INTERLEAVED | {"context_parallel_size": 2}, SCRIPT, None),
        (ROUTERS, {}, SCRIPT, "--dataloader-inter-document-masking"),
        (ROUTERS, UNPACKED | PLANNED, SCRIPT, None),
        # a planned pass of an interleaved pipeline takes one packed sample
        (POOLS, PLANNED, SCRIPT, "--micro-batch-size must be 1"),
        (POOLS, PLANNED | {"micro_batch_size": 1, "eval_micro_batch_size": 1}, SCRIPT, None),
        (POOLS, PLANNED | {"overlap_moe_expert_parallel_comm": False}, SCRIPT, None),
        (POOLS, PLANNED | {"virtual_pipeline_model_parallel_size": None}, SCRIPT, None),
        (POOLS, {"eval_micro_batch_size": 1}, SCRIPT, None),
        (POOLS, {"eval_micro_batch_size": 1, "tensor_model_parallel_size": 2}, SCRIPT, "--eval-micro-batch-size"),
        (POOLS, {"inprocess_restart": True}, SCRIPT, "--inprocess-restart needs"),
        # the router
        (POOLS, {"moe_router_num_groups": 1, "moe_router_group_topk": 1}, SCRIPT, None),
        (OFF, {"moe_router_force_load_balancing": True}, SCRIPT, None),
        (OFF, {"moe_router_force_biased": 0.1}, SCRIPT, None),
        (OFF, TWO_LOSSES, SCRIPT, None),
        (OFF, SINKHORN, SCRIPT, "sinkhorn"),
        (OFF, UNPACKED | {"moe_router_dtype": None}, SCRIPT, None),
        (OFF, {"num_moe_experts": None}, SCRIPT, "--num-experts"),
        # Megatron's own scripts: they say themselves what they do without the package of restarts
        (OFF, {"inprocess_restart": True}, HOST, None),
        (POOLS, {"overlap_moe_expert_parallel_comm": True}, SCRIPT, None),
        (POOLS, {"overlap_moe_expert_parallel_comm": True}, HOST, "--overlap-moe-expert-parallel-comm"),
        (OFF, {"overlap_moe_expert_parallel_comm": True}, HOST, None),
        # packed samples of the standard model are cut as wrongly; multi-token prediction is fine
        (POOLS, CUT, SCRIPT, None),
        (POOLS, CUT, HOST, "--context-parallel-size must be 1"),
        (OFF, CUT, HOST, "--context-parallel-size must be 1"),
        (POOLS, POSITIONS, HOST, "--position-embedding-type"),
        # they have boundaries on two stages
        (POOLS, {"pipeline_model_parallel_size": 2}, HOST, None),
        *((POOLS, stages, SCRIPT, None) for stages in ({"pipeline_model_parallel_size": 4}, INTERLEAVED)),
        *((POOLS, stages, HOST, "pipeline") for stages in ({"pipeline_model_parallel_size": 4}, INTERLEAVED)),
    ],
)
def test_runs_that_are_taken_and_refused(pool, host, rows, flag):
    host = host_options(**host)
    refused = pytest.raises(ValueError, match=flag) if flag else contextlib.nullcontext()
    with refused as caught:
        pool_args.check_run(pool, host, host, rows=rows)
    assert flag is None or str(caught.value).count("  - ") == 1


def test_every_row_of_the_table_is_tested():
    assert {r.field for r in (*MODEL, *SCRIPT)} == set(REFUSED)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_each_row_is_refused_by_name(field, value):
    host = host_options(**{field: value})
    with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
        pool_args.check_run(PoolConfig(pool_min=4), host, host)


KINDS = {"moe_router_load_balancing_type": ["global_aux_loss", "seq_aux_loss"]}
GROUPS = {"moe_router_num_groups": 8, "moe_router_group_topk": 4, "moe_router_topk": 8}
BIAS = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


@pytest.mark.parametrize(
    ("flag", "host", "pool"),
    [
        (None, GROUPS, {}),
        (None, GROUPS, {"pool_group_scope": "document", "pool_min": 16}),
        (None, GROUPS | {"moe_router_topk": 6}, {}),
        (None, KINDS | {"moe_aux_loss_coeff": [0.1, 0.0]}, {"pool_balance": "running"}),
        (None, BIAS, {"pool_score": "gate_with_bias"}),
        ("--moe-aux-loss-coeff", KINDS, {}),
        ("--moe-aux-loss-coeff", KINDS | {"moe_aux_loss_coeff": [0.1]}, {}),
        ("--moe-aux-loss-coeff", {"moe_aux_loss_coeff": [0.1]}, {}),
        (
            "--moe-router-load-balancing-type",
            {"moe_router_load_balancing_type": ["aux_loss"] * 2, "moe_aux_loss_coeff": [0.1, 0.2]},
            {},
        ),
        ("--pool-balance", {"moe_router_load_balancing_type": "seq_aux_loss"}, {"pool_balance": "running"}),
        ("--moe-router-num-groups", GROUPS | {"moe_router_num_groups": 5}, {}),
        ("--moe-router-num-groups", GROUPS | {"moe_router_num_groups": None}, {}),
        ("--moe-router-group-topk", GROUPS | {"moe_router_group_topk": None}, {}),
        ("--moe-router-group-topk", GROUPS | {"moe_router_group_topk": 9}, {}),
        ("--moe-router-group-topk", GROUPS | {"moe_router_topk": 3}, {}),
        ("--moe-router-group-topk", GROUPS | {"moe_router_group_topk": 1}, {}),
        ("--moe-latent-size", {"moe_latent_size": 16}, {}),
        ("--moe-router-num-groups", {}, {"pool_group_scope": "document"}),
        ("--pool-min", GROUPS, {"pool_group_scope": "document", "pool_min": 17}),
        ("--pool-max", GROUPS, {"pool_group_scope": "document", "pool_max": 32}),
        ("--moe-router-score-function", BIAS | {"moe_router_score_function": "softmax"}, {}),
        ("--moe-router-enable-expert-bias", {}, {"pool_score": "gate_with_bias"}),
        (
            "--moe-router-score-function",
            BIAS | {"moe_router_score_function": "softmax"},
            {"pool_score": "gate_with_bias"},
        ),
    ],
)
def test_flags_of_the_router_must_go_together(flag, host, pool):
    host, pool = host_options(**host), PoolConfig(**({"pool_min": 8} | pool))
    refused = pytest.raises(ValueError, match=flag) if flag else contextlib.nullcontext()
    with refused:
        pool_args.check_run(pool, host, host)
    if flag in ("--moe-aux-loss-coeff", "--moe-router-num-groups", "--moe-router-group-topk"):
        # Megatron would stop at an assertion
        parsed = argparse.Namespace(**vars(host), **dataclasses.asdict(pool), num_experts=32)
        with pytest.raises(ValueError, match=flag):
            pool_args.pool_config_from_args(parsed)


def test_all_problems_come_at_once():
    host = host_options(
        moe_expert_capacity_factor=1.0,
        moe_router_dtype=None,
        dataloader_inter_document_masking=False,
        num_moe_experts=2,
        moe_router_force_load_balancing=True,
        moe_token_dispatcher_type="flex",
    )
    with pytest.raises(ValueError, match="cannot start") as caught:
        pool_args.check_run(PoolConfig(pool_min=4, pool_dispatcher="dedup"), host, host)
    for name in (
        "--moe-router-force-load-balancing",
        "--moe-token-dispatcher-type",
        "--moe-expert-capacity-factor",
        "--moe-router-dtype",
        "--dataloader-inter-document-masking",
        "--pool-min",
    ):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("length", "samples"),
    [
        ({"train_samples": 100, "train_iters": None}, 100),
        ({"train_samples": None, "train_iters": 25}, 200),
        ({"train_samples": None, "train_iters": None}, None),
        ({"train_samples": 100, "train_iters": None, "skip_train": True}, None),
    ],
)
def test_pools_that_would_never_start_are_refused(length, samples):
    host = host_options(**{"global_batch_size": 8, "skip_train": False} | length)
    late = PoolConfig(pool_min=4, pool_delay_samples=10**9 if samples is None else samples - 1)
    pool_args.check_run(late, host, host)
    if samples is not None:
        never = dataclasses.replace(late, pool_delay_samples=samples)
        with pytest.raises(ValueError, match=rf"--pool-delay-samples .*\({samples}\).* {samples}$"):
            pool_args.check_run(never, host, host)


def test_another_dataloader_is_warned_about():
    host = host_options(dataloader_type="cyclic")
    with pytest.warns(UserWarning, match="--dataloader-type single"):
        pool_args.check_run(PoolConfig(pool_min=4), host, host)


def test_the_rows_name_options_megatron_has(monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.arguments import parse_args

    monkeypatch.setattr("sys.argv", ["pretrain"])
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert {r.field for r in MODEL} <= known
    assert {r.field for r in SCRIPT} <= set(vars(parse_args(ignore_unknown_args=True)))
