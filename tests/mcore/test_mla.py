"""Multi-latent attention under tensor parallelism: what Megatron's own class gets wrong.

That every layout trains the model of one process with ours: tests/parallel/test_parity.py.
"""

from __future__ import annotations

from unittest import mock

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from support import shards, training
from support.training import Case

from emo_megatron.mcore import spec_rewrite


def _train(case, megatrons_own=False):
    """As training.train; `megatrons_own` keeps Megatron's class of the attention."""
    kept = MLASelfAttention if megatrons_own else spec_rewrite.LatentAttention
    with mock.patch.object(spec_rewrite, "LatentAttention", kept):
        return training.train(case, seed=1)


def test_megatrons_own_class_misses_gradient_under_tensor_parallelism(ranks):
    """Why the local spec has a class of ours; when this fails, Megatron has repaired it and ours can go."""
    latent = {"multi_latent_attention": True, "num_layers": 2, "moe_layer_freq": [0, 1]}
    case = Case(name="TP2", tp=2, mbs=2, pools=False, per_token=True, config=latent)
    (want,) = ranks(1).run(_train, case=case.reference)
    own = ranks(2).run(_train, case=case, megatrons_own=True)
    ours = ranks(2).run(_train, case=case)
    off_own, off_ours = (
        shards.deviations(want["gradients"], [answer["gradients"] for answer in answers]) for answers in (own, ours)
    )
    assert any("linear_kv_down_proj" in key for key, share in off_own.items() if share > 1e-2)
    assert max(off_ours.values()) < 1e-5
