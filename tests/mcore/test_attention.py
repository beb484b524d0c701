"""The local spec's attention: windows, softmax offsets and documents as a loop over queries, and as Megatron's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support import shards, tiny, training
from support.training import Case

from emo_megatron.mcore.attention import DocumentAttention

HEADS, GROUPS, SIZE = 4, 2, 8
BOUNDS = [0, 3, 16, 21, 32]
"""Documents of two samples of 16 tokens, the second of which is longer than the window."""
OPTIONS = {
    "window": {"window_size": (4, 0)},
    "learnable offset": {"softmax_type": "learnable"},
    "off-by-one": {"softmax_type": "off-by-one"},
    "window and offset": {"window_size": (2, 0), "softmax_type": "learnable"},
}


def _inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = [(HEADS, SIZE), (GROUPS, SIZE), (GROUPS, SIZE), (HEADS * SIZE,)]
    return [torch.randn(32, *shape, generator=generator) for shape in shapes]


def _attention(kind, layer_number=1, **options):
    tiny.setup()
    config = tiny.transformer_config(num_query_groups=GROUPS, init_method_std=1.0, **options)
    return kind(config, layer_number, AttnMaskType.causal, "self")


def _gradients(attention, run):
    """What `run` makes of q, k and v, and the gradients of these and of the offsets under one upstream gradient."""
    *inputs, upstream = _inputs()
    leaves = [x.requires_grad_() for x in inputs] + list(attention.parameters())
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves)]


def _packed_and_brute_force(**options):
    attention = _attention(DocumentAttention, **options)
    packed = tiny.packed(BOUNDS, tokens_per_sample=16)
    left = options.get("window_size", (-1, 0))[0]
    offsets = attention.softmax_offset

    def one_by_one(q, k, v):
        rows = []
        for start, stop in itertools.pairwise(BOUNDS):
            for t in range(start, stop):
                first = max(start, t - left) if left >= 0 else start
                for head in range(HEADS):
                    group = head * GROUPS // HEADS
                    logits = k[first : t + 1, group] @ q[t, head] / SIZE**0.5
                    total = logits.exp().sum() + (0 if offsets is None else offsets[head].exp())
                    rows.append(logits.exp() / total @ v[first : t + 1, group])
        return torch.stack(rows).view(32, -1)

    def at_once(q, k, v):
        return attention(q, k, v, None, packed_seq_params=packed)

    return _gradients(attention, at_once), _gradients(attention, one_by_one)


@pytest.mark.parametrize(
    "options",
    [*OPTIONS.values(), {"window_size": (-1, 0)}],
    ids=[*OPTIONS, "unbounded window"],  # a width of -1 for Megatron's own
)
def test_it_is_a_loop_over_queries_that_see_their_document(ranks, options):
    found, wanted = ranks(1).run(_packed_and_brute_force, **options)[0]
    assert len(found) == (5 if options.get("softmax_type") == "learnable" else 4)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def _ours_and_megatrons(**options):
    answers = []
    for kind in (DocumentAttention, DotProductAttention):
        attention = _attention(kind, **options)
        state = {k: torch.full_like(v, 0.5) for k, v in attention.state_dict().items()}
        attention.load_state_dict(state)

        def run(*inputs, attention=attention):
            q, k, v = (x.unflatten(0, (2, 16)).transpose(0, 1).contiguous() for x in inputs)
            mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
            return attention(q, k, v, mask).transpose(0, 1).flatten(0, 1)

        answers.append((sorted(state), _gradients(attention, run)))
        parallel_state.destroy_model_parallel()
    return answers


@pytest.mark.parametrize("layer_number", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_samples_are_as_megatrons(ranks, options, layer_number):
    options = {"window_attn_skip_freq": 2, "layer_number": layer_number, **options}
    ours, megatrons = ranks(1).run(_ours_and_megatrons, **options)[0]
    assert ours[0] == megatrons[0]
    for got, want in zip(ours[1], megatrons[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"cp": 2, "cp_partition": "document"}], ids=["TP2+SP", "CP2 by document"]
)
def test_two_ranks_train_the_model_of_one(ranks, layout):
    config = {"window_size": (3, 0), "window_attn_skip_freq": 2, "softmax_type": "learnable", "num_query_groups": 2}
    case = Case(name="window", mbs=2, per_token=True, config=config, **layout)
    (want,) = ranks(1).run(training.train, case=case.reference, seed=1)
    got = ranks(2).run(training.train, case=case, seed=1)
    for kind in ("gradients", "weights"):
        seen = shards.deviations(want[kind], [answer[kind] for answer in got])
        assert any("softmax_offset" in key for key in seen)
        assert {key: share for key, share in seen.items() if not share <= 1e-5} == {}
