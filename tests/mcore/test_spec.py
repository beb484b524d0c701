"""Specs: pools go into every MoE layer of Megatron's own decoder and into nothing else."""

from __future__ import annotations

import functools
import warnings
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from support import tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import spec

POOLS = PoolConfig(pool_min=3)


def _layers(**overrides):
    tiny.setup()
    model = tiny.model(POOLS, **overrides)
    output = model(**tiny.batch(0), attention_mask=None, packed_seq_params=tiny.packed([0, 9, 16, 32]))
    output.mean().backward()
    return [
        (
            type(layer).__name__,
            type(layer.mlp).__name__,
            getattr(layer.mlp, "shared_experts", None) is not None,
            all(p.grad is not None for p in layer.parameters()),
        )
        for layer in model.decoder.layers
    ]


def test_dense_layers_stay_dense(ranks):
    answer = ranks(1).run(_layers, moe_layer_freq=[0, 1])[0]
    assert [row[:3] for row in answer] == [
        ("PoolTransformerLayer", "MLP", False),
        ("PoolTransformerLayer", "PoolMoELayer", True),
    ]
    assert answer[0][3]


def test_the_shared_expert_is_megatrons_flag(ranks):
    answer = ranks(1).run(_layers, moe_shared_expert_intermediate_size=None)[0]
    assert [row[2] for row in answer] == [False, False]


def _transformer_engine_spec():
    """The TE form of the spec on Megatron's own builder, with TE's classes stood in for where TE is missing."""
    tiny.setup()
    attention = object()
    moe = functools.partial(MoELayer, submodules=MoESubmodules(experts=object))
    layer = ModuleSpec(
        module=TransformerLayer, submodules=TransformerLayerSubmodules(self_attention=attention, mlp=moe)
    )
    block = TransformerBlockSubmodules(layer_specs=[layer], layer_norm=dict)
    asked = []

    def builder(config, **options):
        asked.append(options["use_transformer_engine"])
        return block

    config = tiny.transformer_config()
    config.transformer_impl = "transformer_engine"
    with mock.patch.object(spec, "get_gpt_decoder_block_spec", builder), mock.patch.object(spec, "HAVE_TE", True):
        made = spec.pool_block_spec(config, pool=POOLS)
    new = made.layer_specs[0]
    return (
        asked,
        made.layer_norm is dict,
        new.submodules.self_attention is attention,
        new.module.__name__,
        new.submodules.mlp.func.__name__,
        new.submodules.mlp.keywords["submodules"].router.func.__name__,
        layer.module is TransformerLayer and layer.submodules.mlp is moe,
    )


def test_with_transformer_engine_only_router_and_layers_change(ranks):
    answer = ranks(1).run(_transformer_engine_spec)[0]
    names = ("PoolTransformerLayer", "PoolMoELayer", "PoolRouter")
    assert answer == ([True], True, True, *names, True)


def _norms(normalization):
    tiny.setup()
    model = tiny.model(POOLS, normalization=normalization)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm | torch.nn.LayerNorm)]
    marks = {p.sequence_parallel for norm in norms for p in norm.parameters()}
    return {type(norm).__name__ for norm in norms}, len(norms), marks


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms_carry_the_sequence_parallel_mark(ranks, normalization):
    assert ranks(1).run(_norms, normalization=normalization)[0] == ({normalization}, 5, {False})


def _eos_opens_the_next_document():
    tiny.setup()
    bounds = [0, 1, 5, 16, 20, 32]
    pools = [PoolConfig(pool_min=3, pool_eos_starts_document=eos) for eos in (False, True)]
    return [tiny.scope(tiny.packed(bounds), pool).document_ids_T.tolist() for pool in pools]


def test_the_authors_off_by_one_is_an_option(ranks):
    plain, shifted = ranks(1).run(_eos_opens_the_next_document)[0]
    assert plain == [0] + [1] * 4 + [2] * 11 + [3] * 4 + [4] * 12
    # a boundary moved to the start of the sample is none; the end of a sample stays
    assert shifted == [1] * 4 + [2] * 12 + [3] * 3 + [4] * 13


def _refused(pool, variant=None, is_built=False, **overrides):
    """Error and message of a spec, or of its model; a variant of attention is set where Megatron does not look."""
    tiny.setup()
    config = tiny.transformer_config(**overrides)
    config.experimental_attention_variant = variant
    try:
        spec.pool_block_spec(config, pool=pool)
        if is_built:
            tiny.model(pool, **overrides)
    except (ImportError, NotImplementedError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", ""


CUT = {"multi_latent_attention": True, "context_parallel_size": 2}
FUSED = {"multi_latent_attention": True, "mla_down_proj_fusion": True, "tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("error", "names", "pool", "options"),
    [
        ("ImportError", ["--transformer-impl local"], POOLS, {"transformer_impl": "transformer_engine"}),
        ("ValueError", ["--moe-layer-freq"], POOLS, {"moe_layer_freq": [0, 0]}),
        (
            "ValueError",
            ["--pool-min", "--moe-expert-capacity-factor"],
            PoolConfig(pool_min=1),
            {"moe_expert_capacity_factor": 1.0},
        ),
        (
            "NotImplementedError",
            ["--apply-query-key-layer-scaling", "Transformer Engine"],
            POOLS,
            {"apply_query_key_layer_scaling": True, "is_built": True},
        ),
        ("ValueError", ["--mla-down-proj-fusion"], POOLS, FUSED),
        ("ValueError", ["--pool-cp-partition"], POOLS, CUT),
        ("ValueError", ["--experimental-attention-variant"], POOLS, {"variant": "gated_delta_net"}),
        ("", [], PoolConfig(pool_min=3, pool_cp_partition="document"), CUT),
        ("", [], PoolConfig(pool_min=3, pool_documents="routers"), CUT),
    ],
)
def test_what_layers_cannot_be_built_of_is_refused_by_flag(ranks, error, names, pool, options):
    ((found, message),) = ranks(1).run(_refused, pool=pool, **options)
    assert found == error
    for name in names:
        assert name in message


def _warnings(loop, capacity):
    tiny.setup()
    config = tiny.transformer_config(
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
        moe_expert_rank_capacity_factor=capacity,
        use_transformer_engine_op_fuser=True,
    )
    megatrons = mock.Mock() if loop == "megatron.training" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mock.patch.object(spec, "training_args", return_value=megatrons):
            spec._check(config, POOLS)
    return [str(warning.message).split(":")[0] for warning in caught]


@pytest.mark.parametrize(
    ("loop", "capacity", "told"),
    [
        ("other", 2.0, ["--moe-expert-rank-capacity-factor"]),
        ("other", None, []),
        # which reads over budget itself
        ("megatron.training", 2.0, []),
    ],
)
def test_a_loop_that_must_look_for_dropped_tokens_is_told(ranks, loop, capacity, told):
    assert ranks(1).run(_warnings, loop=loop, capacity=capacity)[0] == told


def _stages_of_dense_layers():
    tiny.setup(pipeline_model_parallel_size=2)
    model = tiny.model(POOLS, moe_layer_freq=[0, 1])
    return [type(layer.mlp).__name__ for layer in model.decoder.layers]


def test_a_pipeline_stage_may_be_all_dense(ranks):
    assert ranks(2).run(_stages_of_dense_layers) == [["MLP"], ["PoolMoELayer"]]


def _without_data_parallel_group():
    """Ranks as the scope sees them, from a collection without `dp` as some hosts hand over, and the true ones."""
    tiny.setup(tensor_model_parallel_size=2)
    model = tiny.model(POOLS)
    layer = model.decoder.layers[0]
    del layer.pg_collection.dp
    shard = layer._shard()
    return (shard.dp_rank, shard.dp_size), (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


@pytest.mark.slow
def test_a_host_without_data_parallel_group_is_served(ranks):
    for found, true in ranks(4).run(_without_data_parallel_group):
        assert found == true
