"""Multi-latent attention under tensor parallelism: what Megatron's own class gets wrong.

That every layout trains the model of one process with ours: tests/parallel/test_parity.py.
"""

from __future__ import annotations

from unittest import mock

from support import shards, training
from support.training import Case


def _train(case, megatrons_own=False):
    """As training.train; `megatrons_own` keeps Megatron's class of the attention."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    from emo_megatron.mcore import spec_rewrite

    kept = MLASelfAttention if megatrons_own else spec_rewrite.LatentAttention
    with mock.patch.object(spec_rewrite, "LatentAttention", kept):
        return training.train(case, seed=1)


def _deviations(want, got, kind):
    """Distance of every tensor, as a share of its norm."""
    wanted, found = shards.join([want[kind]]), shards.join([answer[kind] for answer in got])
    assert found.keys() == wanted.keys()
    return {key: float((found[key] - value).norm() / value.norm().clamp(min=1e-12)) for key, value in wanted.items()}


def test_megatrons_own_class_misses_gradient_under_tensor_parallelism(ranks):
    """Why the local spec has a class of ours; when this fails, Megatron has repaired it and ours can go."""
    latent = {"multi_latent_attention": True, "num_layers": 2, "moe_layer_freq": [0, 1]}
    case = Case(name="TP2", tp=2, mbs=2, pools=False, per_token=True, config=latent)
    (want,) = ranks(1).run(_train, case=case.reference)
    own = ranks(2).run(_train, case=case, megatrons_own=True)
    ours = ranks(2).run(_train, case=case)
    wrong = {k for k, v in _deviations(want, own, "gradients").items() if v > 1e-2}
    assert any("linear_kv_down_proj" in key for key in wrong)
    assert max(_deviations(want, ours, "gradients").values()) < 1e-5
