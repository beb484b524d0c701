"""Pools in HybridModel, whose attention and MoE layers are layers of their own: the model of GPT, in every layout."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.spec_utils import import_module
from support import shards, tiny, training
from support.layouts import MTP, PADDED
from support.training import Case

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import spec
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.router_documents import RouterDocuments, forward_with_documents
from emo_megatron.mcore.spec import pool_hybrid_spec

TOLERANCE = 1e-5
PATTERN = "*-*E|*E*E"
CONFIG = {"num_layers": 8, "moe_layer_freq": 1}
FURTHER = {**PADDED, "config": CONFIG | MTP["config"]}
SLOW = pytest.mark.slow


def _hybrid(config, pool, pattern, **options):
    return HybridModel(
        config=config,
        hybrid_stack_spec=pool_hybrid_spec(config, pool=pool),
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        **options,
    )


def _train(case, seed):
    """As training.train, with a HybridModel of PATTERN."""
    original = training._model
    pattern = PATTERN if case.pp > 1 else PATTERN.replace("|", "")
    pattern += "/*E" * case.config.get("mtp_num_layers", 0)
    training._model = lambda case, config, vp_stage: _hybrid(
        config,
        training.pool_config(case),
        pattern,
        vocab_size=training.VOCAB,
        max_sequence_length=training.SEQ * 8,
        position_embedding_type="learned_absolute" if case.has_slots else "rope",
    )
    try:
        return training.train(case, seed=seed)
    finally:
        training._model = original


@pytest.fixture(scope="module")
def reference(ranks):
    """Seed of a case, and what one process trains with it."""
    found = {}

    def get(case):
        key = repr(case.reference)
        if key not in found:
            found[key] = training.reference(ranks(1).run, case, _train)
        return found[key]

    return get


@pytest.mark.parametrize(
    "case",
    [
        Case(name="EP2", dp=2, ep=2, recompute="moe", accumulation=2, config=CONFIG),
        Case(name="PP2", pp=2, recompute="moe", mbs=2, accumulation=2, config=CONFIG),
        Case(name="TP2", tp=2, recompute="full", mbs=2, accumulation=2, config=CONFIG),
        *(
            pytest.param(Case(name=f"{name}, prediction", **layout, **FURTHER), marks=marks)
            for name, layout, *marks in [
                ("CP2", {"cp": 2, "mbs": 2, "accumulation": 2, "recompute": "full"}),
                ("PP2", {"pp": 2, "mbs": 2, "accumulation": 4, "recompute": "moe"}, SLOW),
                ("EP2", {"dp": 2, "ep": 2, "accumulation": 2, "recompute": "full"}, SLOW),
                ("TP2", {"tp": 2, "accumulation": 2, "recompute": "moe"}, SLOW),
                ("CP2 x PP2", {"cp": 2, "pp": 2, "accumulation": 4, "recompute": "full"}, SLOW),
            ]
        ),
    ],
    ids=lambda case: case.id,
)
def test_layouts_train_the_model_of_one_process(ranks, reference, case):
    seed, want = reference(case)
    got = ranks(case.world_size).run(_train, case=case, seed=seed)
    for answer in got:
        assert answer["metrics"] == pytest.approx(want["metrics"], rel=TOLERANCE)
        if answer["losses"]:
            for kind in ("losses", "further_losses"):
                assert answer[kind] == pytest.approx(want[kind], rel=TOLERANCE)
    for kind in ("gradients", "weights"):
        assert max(shards.deviations(want[kind], [answer[kind] for answer in got]).values()) <= TOLERANCE
    decisions = training.decisions_of(got)
    assert max(layer for layer, _ in decisions) == 8 + case.config.get("mtp_num_layers", 0)
    assert decisions == want["decisions"]


def test_every_token_keeps_to_the_pool_of_its_document(reference):
    _, answer = reference(Case(mbs=2, accumulation=2, config=CONFIG))
    layers = {layer for layer, _ in answer["decisions"]}
    assert layers == {4, 6, 8}, "the places of E in the pattern"
    for layer in layers:
        pools = answer["decisions"][layer, "pools"]
        assert min(map(len, pools.values())) < 8
        for place, experts in answer["decisions"][layer, "experts"].items():
            sample, position = divmod(place, training.SEQ)
            start = max(offset for row, offset in pools if row == sample and offset <= position)
            assert set(experts) <= set(pools[sample, start])


def _as_gpt():
    """Losses of a GPTModel and of a HybridModel with its weights, and where their gradients differ."""
    tiny.setup()
    # a layer's number is in the hash that draws pool sizes, and a hybrid stack counts other layers: one size
    pool = PoolConfig(pool_min=3, pool_max=3)
    gpt = tiny.model(pool)
    hybrid = _hybrid(
        tiny.transformer_config(num_layers=4),
        pool,
        "*E*E",
        vocab_size=tiny.VOCAB,
        max_sequence_length=tiny.SEQ * tiny.ROWS,
        position_embedding_type="rope",
    )

    def name_in_hybrid(key):
        if key.startswith("decoder.layers."):
            layer, rest = key.removeprefix("decoder.layers.").split(".", 1)
            is_moe = rest.startswith(("mlp.", "pre_mlp_layernorm."))
            return f"decoder.layers.{2 * int(layer) + is_moe}.{rest}"
        return key.replace("final_layernorm", "final_norm")

    state = {name_in_hybrid(key): value for key, value in gpt.state_dict().items()}
    hybrid.load_state_dict(state)
    losses = []
    for model in (gpt, hybrid):
        # it has a place for every layer of the first model that it met
        destroy_moe_metrics_tracker()
        packed = tiny.packed([0, 9, 16, 32])
        loss = model(**tiny.batch(0), attention_mask=None, packed_seq_params=packed).mean()
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad for name, p in hybrid.named_parameters()}
    different = [name for name, p in gpt.named_parameters() if not torch.equal(p.grad, gradients[name_in_hybrid(name)])]
    try:
        hybrid(**tiny.batch(0), attention_mask=None)
    except ValueError as error:
        message = str(error)
    routers = sum(isinstance(module, PoolRouter) for module in hybrid.modules())
    return losses, different, len(gradients), message, routers


def test_it_is_gpts_model_with_gpts_weights(ranks):
    losses, different, num_tensors, message, routers = ranks(1).run(_as_gpt)[0]
    assert losses[0] == losses[1]
    assert different == []
    assert num_tensors > 20
    assert "--dataloader-inter-document-masking" in message
    assert routers == 2


def _built_by_megatron(config_text, tmp, pattern="*E*E", depths=None):
    """The routers of the model that pretrain_hybrid.py builds of --spec emo_megatron.mcore.spec pool_hybrid_layer_spec.

    Their pools, layer numbers and depths of prediction; or the error.
    """
    from megatron.training.models.hybrid import HybridModelConfig

    tiny.setup()
    spec = import_module(("emo_megatron.mcore.spec", "pool_hybrid_layer_spec"))
    config = HybridModelConfig(
        transformer=tiny.transformer_config(num_layers=4, mtp_num_layers=depths),
        hybrid_stack_spec=spec,
        hybrid_layer_pattern=pattern,
        vocab_size=tiny.VOCAB,
        seq_length=tiny.SEQ,
    )
    if config_text is not None:
        (tmp / "pool.json").write_text(config_text)
        os.environ["EMO_POOL_CONFIG"] = str(tmp / "pool.json")
    try:
        builder = config.get_builder_cls()(config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        # twice: virtual stages are built one after the other of one spec
        builder.build_model(groups)
        model = builder.build_model(groups)
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop("EMO_POOL_CONFIG", None)
    routers = [m for m in model.modules() if isinstance(m, PoolRouter)]
    return [(router.pool, router.layer_number, router.mtp_depth) for router in routers]


def test_megatrons_builder_takes_it_as_a_spec(ranks, tmp_path):
    run = functools.partial(ranks(1).run, _built_by_megatron, tmp=tmp_path)
    pool, text = PoolConfig(pool_min=3), '{"pool_min": 3}'
    assert run(config_text=text)[0] == [(pool, 2, 0), (pool, 4, 0)]
    # a depth's stack is numbered from 1 by Megatron, its MoE layer not marked as one of prediction
    predicting = run(config_text=text, pattern="*E*E/*E/*E", depths=2)[0]
    assert predicting == [(pool, 2, 0), (pool, 4, 0), (pool, 5, 1), (pool, 6, 2)]
    assert "EMO_POOL_CONFIG must be" in run(config_text=None)[0]
    assert "--num-experts (8); got 9" in run(config_text='{"pool_min": 9}')[0]


def _with_prediction(repeated, **recompute):
    """Losses and gradients of two micro-batches, whose boundaries go to the routers only."""
    tiny.setup()
    destroy_moe_metrics_tracker()
    predicting = {"mtp_num_layers": 2, "mtp_use_repeated_layer": repeated}
    model = _hybrid(
        tiny.transformer_config(num_layers=4, **predicting, **recompute),
        PoolConfig(pool_min=2, pool_max=4, pool_documents="routers"),
        "*E*E/*E/*E",
        vocab_size=tiny.VOCAB,
        max_sequence_length=tiny.SEQ,
        position_embedding_type="rope",
    )
    shards.initialise([model], seed=5)
    losses = []
    for step in range(2):
        shape = (tiny.ROWS, tiny.SEQ)
        tokens = torch.randint(tiny.VOCAB, shape, generator=torch.Generator().manual_seed(step))
        positions = torch.arange(tiny.SEQ).expand(shape)
        documents = RouterDocuments(
            cu_seqlens=torch.tensor([0, 5 + step, tiny.SEQ, tiny.ROWS * tiny.SEQ]), tokens_per_sample=tiny.SEQ
        )
        output = forward_with_documents(model, documents, tokens, positions, None, labels=tokens)
        output.mean().backward()
        losses.append(output.mean().item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("repeated", [False, True], ids=["layers", "one layer"])
def test_recompute_of_prediction_repeats_its_pools(ranks, repeated):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (losses, gradients), (again, repeated_gradients) = (
        ranks(1).run(_with_prediction, repeated=repeated, **options)[0] for options in ({}, full)
    )
    assert again == losses
    assert gradients.keys() == repeated_gradients.keys()
    for name, gradient in gradients.items():
        difference = (repeated_gradients[name] - gradient).norm()
        assert difference <= TOLERANCE * gradient.norm().clamp(min=1e-12), name


def _stacks():
    """Which layers of Megatron's Transformer Engine stack change, and what a local stack without them says."""
    tiny.setup()
    config = tiny.transformer_config(num_layers=2)
    try:
        _hybrid(config, PoolConfig(pool_min=3), "M*", vocab_size=8, max_sequence_length=8)
    except NotImplementedError as error:
        message = str(error)
    config.transformer_impl = "transformer_engine"
    has_te, spec.HAVE_TE = spec.HAVE_TE, True
    try:
        made = spec.pool_hybrid_spec(config, pool=PoolConfig(pool_min=3))
    finally:
        spec.HAVE_TE = has_te
    stock = vars(hybrid_stack_spec.submodules)
    changed = [name for name, layer in vars(made.submodules).items() if layer is not stock[name]]
    moe = made.submodules.moe_layer
    router = moe.submodules.mlp.keywords["submodules"].router.func
    names = [made.module, moe.module, moe.submodules.mlp.func, router]
    return message, changed, [name.__name__ for name in names]


def test_with_transformer_engine_only_the_moe_layer_changes(ranks):
    message, changed, names = ranks(1).run(_stacks)[0]
    assert changed == ["moe_layer", "mtp_block_spec"]
    assert names == ["HybridStack", "PoolTransformerLayer", "PoolMoELayer", "PoolRouter"]
    assert "--hybrid-layer-pattern must have only attention (*)" in message
