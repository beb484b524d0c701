"""What an export cannot express is refused by its flag, and every flag of Megatron's experts is known here."""

from __future__ import annotations

import argparse
import dataclasses
import types

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from support import decoder

from emo_megatron.hf.mapping import FUSED_NORM
from emo_megatron.hf.megatron import MODEL_FLAGS, REQUIREMENTS, architecture_of, check_router, flags_of

NOT_THE_MODEL = {
    *("moe_layer_freq", "moe_shared_expert_gate"),  # read from the weights, and beside MODEL_FLAGS
    *("moe_enable_routing_replay", "moe_layer_recompute", "moe_per_layer_logging"),
    *("moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_grad_scale_func"),
    "moe_router_bias_update_rate",
    "moe_expert_rank_capacity_factor",  # a step in which a token was dropped is not taken
    "moe_router_quantile_balancing_ema",  # of a balancing that is refused
    *("moe_router_dtype", "moe_router_fusion", "moe_permute_fusion", "moe_shared_expert_overlap"),
    *("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"),
    *("moe_pad_experts_for_cuda_graph_inference", "moe_enable_deepep", "moe_deepep_num_sms"),
    # of a capacity that is refused
    *("moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
    *("moe_token_dispatcher_type", "moe_permute_fusion_into_hybridep"),
}
"""Fields that change nothing about what a stored model computes but rounding."""
DISPATCHERS = ("moe_flex_", "moe_hybridep_", "moe_ncclep_", "moe_paged_stash")
"""What the names of more of them begin with."""


def checkpoint(**changes):
    """What `architecture_of` looks at."""
    model = decoder.architecture()
    flags = flags_of(model, dtype=torch.float32, moe_norm=FUSED_NORM, pools={}, tokenizer=None)
    embedding = types.SimpleNamespace(shape=(model.vocab_size, model.hidden_size))
    return types.SimpleNamespace(
        args=argparse.Namespace(**vars(flags) | changes),
        path="checkpoint",
        moe_layers=(1, 2, 3),
        names={"embedding.word_embeddings.weight": embedding},
    )


def test_a_router_that_megatron_has_no_flags_for_is_refused():
    model = dataclasses.replace(decoder.architecture(), top_k=1, renormalise=True)
    with pytest.raises(ValueError, match=r"folder/config\.json.*norm_topk_prob"):
        check_router(model, where="folder/config.json")
    plain = dataclasses.replace(model, renormalise=False)
    check_router(plain, where="folder/config.json")
    flags = flags_of(plain, dtype=torch.float32, moe_norm=FUSED_NORM, pools={}, tokenizer=None)
    assert flags.moe_router_pre_softmax


def test_the_flags_of_an_architecture_are_its_own():
    assert architecture_of(checkpoint()) == decoder.architecture()


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("moe_router_load_balancing_type", "sinkhorn", "choosing other experts"),
        ("moe_router_load_balancing_type", "quantile_balancing", "choosing other experts"),
        ("moe_router_load_balancing_type", ["aux_loss", "sinkhorn"], "choosing other experts"),
        ("moe_router_load_balancing_type", [], "choosing other experts"),
        ("moe_router_score_function", "sqrtsoftplus", "a softmax and its top-k"),
        ("moe_router_group_topk", 2, "without bias, groups or scaling"),
        ("moe_router_topk_limited_devices", 2, "without bias, groups or scaling"),
        ("moe_router_topk_scaling_factor", 2.5, "without bias, groups or scaling"),
        ("moe_router_force_load_balancing", True, "without noise"),
        ("moe_router_force_biased", 0.1, "without noise"),
        ("moe_input_jitter_eps", 0.01, "without noise"),
        ("moe_expert_capacity_factor", 1.0, "no token is dropped"),
        ("moe_token_dropping", True, "no token is dropped"),
    ],
)
def test_routing_that_is_not_there_is_refused(flag, value, reason):
    with pytest.raises(ValueError, match=f"{flag} must .*; got .*: .*{reason}"):
        architecture_of(checkpoint(**{flag: value}))


@pytest.mark.parametrize("kind", ["none", "aux_loss", "global_aux_loss", ["seq_aux_loss", "global_aux_loss"]])
def test_a_loss_is_no_routing(kind):
    assert architecture_of(checkpoint(moe_router_load_balancing_type=kind)).top_k == 2


def test_every_flag_of_megatrons_experts_is_known():
    known = {requirement.field for requirement in REQUIREMENTS} | set(MODEL_FLAGS) | NOT_THE_MODEL
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = {name for name in fields - known if name.startswith("moe_") and not name.startswith(DISPATCHERS)}
    assert unknown == set()
