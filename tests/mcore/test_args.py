"""Flags and refusals: one clear error before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import types

import pytest

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import args as pool_args
from emo_megatron.mcore.refusals import CONFIG_REFUSALS, SCRIPT_REFUSALS


def _parse(*argv: str) -> argparse.Namespace:
    return pool_args.add_pool_args(argparse.ArgumentParser()).parse_args(argv)


def test_defaults_are_off_and_every_field_is_a_flag():
    assert pool_args.pool_config_from_args(_parse()) == PoolConfig()


def test_flags_make_the_configuration():
    parsed = _parse(
        *(
            "--pool-min",
            "8",
            "--pool-max",
            "100",
            "--pool-eval",
            "none",
            "--pool-mask",
            "selection",
        ),
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


def test_help_documents_every_flag(capsys):
    with pytest.raises(SystemExit):
        _parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "document pools" in text
    for field in dataclasses.fields(PoolConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "Smallest pool, in routed experts" in text


def _host(**overrides):
    """The attributes of a host configuration the refusals read, all allowed."""
    allowed = {r.field: r.allowed[0] for r in (*CONFIG_REFUSALS, *SCRIPT_REFUSALS)}
    allowed |= {
        "num_moe_experts": 32,
        "moe_router_topk": 2,
        "dataloader_inter_document_masking": True,
    }
    return types.SimpleNamespace(**(allowed | overrides))


REFUSED = {
    "moe_router_load_balancing_type": [
        "aux_loss",
        "seq_aux_loss",
        "sinkhorn",
        "quantile_balancing",
    ],
    "moe_router_dtype": [None, "fp64"],
    "moe_router_score_function": ["sqrtsoftplus"],
    "moe_router_num_groups": [4],
    "moe_router_group_topk": [2],
    "moe_router_fusion": [True],
    "moe_enable_routing_replay": [True],
    "moe_expert_capacity_factor": [1.0],
    "moe_latent_size": [16],
    "mlp_chunks_for_training": [2],
    "mtp_num_layers": [1],
    "overlap_moe_expert_parallel_comm": [True],
    "cuda_graph_impl": ["local", "transformer_engine"],
    "transformer_impl": ["inference_optimized"],
    "experimental_attention_variant": ["gated_delta_net"],
    "context_parallel_size": [2],
    "sft": [True],
    "fim_data": [True],
    "logits_load_dir": ["teacher"],
    "modelopt_enabled": [True],
    "spec": [["a", "b"]],
    "hybrid_context_parallel": [True],
    "heterogeneous_layers_config_path": ["layers.json"],
    "reset_attention_mask": [True],
}


def test_every_row_of_the_table_is_tested():
    assert {r.field for r in (*CONFIG_REFUSALS, *SCRIPT_REFUSALS)} == set(REFUSED)


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_each_row_is_refused_by_name(field, value):
    host = _host(**{field: value})
    with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
        pool_args.check_run(PoolConfig(pool_min=4), host, host)


def test_an_allowed_run_passes():
    pool_args.check_run(PoolConfig(pool_min=4), _host(), _host())


def test_a_list_of_allowed_balancing_types_passes_and_a_mixed_one_does_not():
    mixed = _host(moe_router_load_balancing_type=["global_aux_loss", "seq_aux_loss"])
    fine = _host(moe_router_load_balancing_type=["global_aux_loss"])
    pool_args.check_run(PoolConfig(), fine, fine)
    with pytest.raises(ValueError, match="seq_aux_loss"):
        pool_args.check_run(PoolConfig(), mixed, mixed)


def test_all_problems_come_at_once():
    host = _host(
        mtp_num_layers=1,
        moe_router_dtype=None,
        dataloader_inter_document_masking=False,
        num_moe_experts=2,
    )
    with pytest.raises(ValueError, match="cannot start") as caught:
        pool_args.check_run(PoolConfig(pool_min=4), host, host)
    for name in (
        "--mtp-num-layers",
        "--moe-router-dtype",
        "--dataloader-inter-document-masking",
        "--pool-min",
    ):
        assert name in str(caught.value)


def test_the_standard_model_needs_neither_fp32_routing_nor_boundaries():
    host = _host(moe_router_dtype=None, dataloader_inter_document_masking=False)
    pool_args.check_run(PoolConfig(), host, host)


def test_no_experts_is_said_plainly():
    host = _host(num_moe_experts=None)
    with pytest.raises(ValueError, match="--num-experts"):
        pool_args.check_run(PoolConfig(), host, host)
