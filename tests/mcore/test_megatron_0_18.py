"""Megatron-Core 0.18.2, beside the developed-against version: one training step in EP2 and in PP2.

`make test` installs it into .venv/megatron-core-0.18 without touching the environment's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks import Ranks

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
    import torch
    from megatron.core import parallel_state
    from megatron.core.package_info import __version__
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from support import tiny

    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.compat import require_megatron

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
    gradients = [
        p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters()
    ]
    sizes = [{layer: pool.sum(1).tolist() for layer, pool in s.pools.items()} for s in scopes]
    return (
        __version__,
        require_megatron(),
        losses,
        all(gradients),
        sizes,
        parallel_state.is_pipeline_last_stage(),
    )


@pytest.mark.parametrize(
    "layout",
    [{"expert_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["EP2", "PP2"],
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
