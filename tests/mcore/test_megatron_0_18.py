"""Megatron-Core 0.18.2, beside the developed-against version: training in layouts, long context too, specs rewritten.

`make test` installs it into .venv/megatron-core-0.18 without touching the environment's own.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.package_info import __version__
from megatron.core.pipeline_parallel import get_forward_backward_func
from support import tiny, training
from support.layouts import FEATURES
from support.ranks import Ranks

from emo_megatron.config import PoolConfig
from emo_megatron.mcore import spec
from emo_megatron.mcore.compat import require_megatron

MEGATRON = Path(__file__).resolve().parents[2] / ".venv" / "megatron-core-0.18"

pytestmark = pytest.mark.skipif(
    not MEGATRON.exists(), reason="megatron-core 0.18 is not installed beside: run `make test`"
)


@pytest.fixture(scope="module")
def old_ranks():
    group = Ranks(2, megatron=MEGATRON)
    yield group
    group.close()


def _step(layout):
    """Two micro-batches through Megatron's own schedule, with explicit boundaries."""
    tiny.setup(**layout)
    model = tiny.model(PoolConfig(pool_min=3))
    # packed micro-batches of two samples are [2 s, 1, h]: their shape travels with them
    model.config.variable_seq_lengths = True
    scopes = []

    def forward_step(iterator, model):
        seed = next(iterator)
        packed = tiny.packed([0, 5, 16, 20 + seed, 32])
        output = model(**tiny.batch(seed), attention_mask=None, packed_seq_params=packed)
        scopes.append(packed.emo_scope)
        return output, lambda out: (out.mean(), {"loss": out.mean().item()})

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([0, 1]),
        model=[model],
        num_microbatches=2,
        seq_length=tiny.SEQ,
        micro_batch_size=tiny.ROWS,
        forward_only=False,
    )
    gradients = [p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters()]
    sizes = [{layer: pool.sum(1).tolist() for layer, pool in s.pools.items()} for s in scopes]
    return (__version__, require_megatron(), losses, all(gradients), sizes, parallel_state.is_pipeline_last_stage())


@pytest.mark.parametrize(
    "layout", [{"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}], ids=["EP2", "PP2"]
)
def test_one_training_step(old_ranks, layout):
    answers = old_ranks.run(_step, layout=layout)
    for version, gate, losses, has_gradients, sizes, is_last in answers:
        assert version.startswith("0.18.2")
        assert gate == (0, 18)
        assert has_gradients
        assert len(sizes) == 2
        assert all(3 <= n <= 8 for scope in sizes for pools in scope.values() for n in pools)
        if is_last:
            assert len(losses) == 2
            assert all(0 < loss["loss"] < 20 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "CP2, documents padded",
        "CP2, loss over tokens, multi-token prediction",
        "PP2, one layer of multi-token prediction",
    ],
)
def test_long_context_trains_the_model_of_one_process(old_ranks, name):
    (case,) = [case for case in FEATURES if case.name == name]
    alone = Ranks(1, megatron=MEGATRON)
    try:
        seed, want = training.reference(alone.run, case)
    finally:
        alone.close()
    answers = old_ranks.run(training.train, case=case, seed=seed)
    for answer in answers:
        if answer["losses"]:
            assert answer["losses"] == pytest.approx(want["losses"], rel=1e-5)
    assert training.decisions_of(answers) == want["decisions"]


def _rewritten():
    """Classes of a recipe's layer once it has pools, and what is said to attention that needs 0.19."""
    tiny.setup()
    pool = PoolConfig(pool_min=3)
    config = tiny.transformer_config(multi_latent_attention=True)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    config.transformer_impl = "transformer_engine"
    with mock.patch.object(spec, "HAVE_TE", True):
        layer = spec.with_pools(block, config=config, pool=pool).layer_specs[0]
        config.experimental_attention_variant = "dsa"
        with pytest.raises(ValueError, match="dsa") as caught:
            spec.with_pools(block, config=config, pool=pool)
    mlp = layer.submodules.mlp
    return (
        layer.module.__name__,
        mlp.func.__name__,
        mlp.keywords["submodules"].router.func.__name__,
        layer.submodules.self_attention.module.__name__,
    ), str(caught.value)


def test_specs_are_rewritten(old_ranks):
    names = ("PoolTransformerLayer", "PoolMoELayer", "PoolRouter")
    for found, refused in old_ranks.run(_rewritten):
        assert found == (*names, "LatentAttention")
        assert "--experimental-attention-variant" in refused
