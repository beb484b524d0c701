"""Boundaries for the routers only: the host trains as without them, and pools follow them, recompute included."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core import parallel_state as state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_batch_on_this_cp_rank
from support import shards, tiny

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.context import CLOCK, Packing, make_scope
from emo_megatron.mcore.dataset import write_indexed_dataset
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.router_documents import RouterDocuments, forward_with_documents, merged_bounds

SEQ, ROWS, VOCAB = tiny.SEQ, tiny.ROWS, tiny.VOCAB
BOUNDS = [0, 5, 16, 20, 27, 32]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _model(pool, *, positions="learned_absolute", **options):
    """On a CPU Megatron's rotary embedding cannot be cut over context-parallel ranks: it pins memory."""
    torch.manual_seed(3)
    cp_size = parallel_state.get_context_parallel_world_size()
    return tiny.model(pool, positions=positions, context_parallel_size=cp_size, **options).train()


def _batch(seed):
    tokens = torch.randint(VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(seed))
    batch = {
        "tokens": tokens,
        "position_ids": torch.arange(SEQ).repeat(ROWS, 1),
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(ROWS, SEQ),
    }
    group = state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def _documents(bounds):
    return bounds and RouterDocuments(cu_seqlens=torch.tensor(bounds), tokens_per_sample=SEQ)


def _forward(model, documents, *, seed=1, **options):
    batch = _batch(seed)
    return forward_with_documents(
        model,
        documents,
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        **options,
    )


def _trained(pools, cp, mtp):
    """Per-token losses and logits, every gradient and the losses of MTP, for each (pools, boundaries)."""
    tiny.setup(context_parallel_size=cp)
    # without pools routing runs in plain PyTorch, and compiled ops differ in the last bits
    was, PoolRouter.backend = PoolRouter.backend, lambda *_: "reference"
    found = []
    for size, bounds in pools:
        MTPLossLoggingHelper.tracker = {}
        pool = PoolConfig(pool_min=size, pool_documents="routers")
        model = _model(pool, positions="learned_absolute" if cp > 1 else "rope", mtp_num_layers=int(mtp) or None)
        logits = []
        model.output_layer.register_forward_hook(functools.partial(_keep_logits, logits))
        losses = _forward(model, _documents(bounds))
        losses.sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        tracked = MTPLossLoggingHelper.tracker.get("loss_values")
        outputs = torch.cat([losses.detach().flatten(), *(part.flatten() for part in logits)])
        found.append((outputs, gradients, tracked))
    MTPLossLoggingHelper.tracker = {}
    PoolRouter.backend = was
    return found


def _keep_logits(kept, _module, _inputs, output):
    kept.append(output[0].detach())


@pytest.mark.parametrize(("cp", "mtp"), [(1, False), (1, True), (2, False)])
def test_pools_of_all_experts_are_the_model_without_boundaries(ranks, cp, mtp):
    runs = [(None, None), (8, BOUNDS), (8, [0, SEQ, 2 * SEQ])]
    for (outputs, gradients, tracked), *others in ranks(cp).run(_trained, pools=runs, cp=cp, mtp=mtp):
        assert (tracked is not None) == mtp
        for other_outputs, other_gradients, other_tracked in others:
            assert torch.equal(other_outputs, outputs)
            assert gradients.keys() == other_gradients.keys()
            for name, gradient in gradients.items():
                assert torch.equal(other_gradients[name], gradient), name
            assert not mtp or torch.equal(other_tracked, tracked)


def _step(layout, options):
    """Pools that the routers used and gradients of two micro-batches through Megatron's schedule."""
    tiny.setup(**layout)
    pool = PoolConfig(pool_min=2, pool_max=4, pool_documents="routers")
    model = _model(pool, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=0.0, **options)
    model.config.finalize_model_grads_func = None
    shards.initialise([model], seed=5)
    order = iter(range(4))
    kept = []

    def step(_, model):
        index = next(order)
        documents = _documents([0, 3 + index, 16, 20, 27 - index, 32])
        kept.append(documents)
        output = _forward(model, documents, seed=index)
        return output, lambda losses: (losses.sum(), {"loss": losses.detach().sum()})

    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=model,
        num_microbatches=4,
        seq_length=SEQ,
        micro_batch_size=ROWS,
        forward_only=False,
    )
    total = sum(float(entry["loss"]) for entry in losses)
    if layout.get("context_parallel_size", 1) > 1:
        summed = torch.tensor(total)
        torch.distributed.all_reduce(summed, group=state.get_context_parallel_group())
        total = float(summed)
    pools = [{n: p.tolist() for n, p in d._scope.pools.items()} for d in kept]
    norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    return (total if losses else None), pools, norms


def test_full_recompute_repeats_the_pools_of_its_own_microbatch(ranks):
    (plain,) = ranks(1).run(_step, layout={}, options={})
    (again,) = ranks(1).run(_step, layout={}, options=FULL)
    assert again == plain


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"context_parallel_size": 2}, {}),
        ({"pipeline_model_parallel_size": 2}, FULL | {"deallocate_pipeline_outputs": True}),
        ({"tensor_model_parallel_size": 2}, FULL),
    ],
    ids=["CP2 by sample", "PP2, full recompute", "TP2 + SP, full recompute"],
)
def test_layouts_have_the_pools_of_one_process(ranks, layout, options):
    ((loss, pools, norms),) = ranks(1).run(_step, layout={}, options={})
    answers = ranks(2).run(_step, layout=layout, options=options)
    losses = [answer[0] for answer in answers if answer[0] is not None]
    assert losses == pytest.approx([loss] * len(losses), rel=1e-5)
    assert losses
    for index, wanted in enumerate(pools):
        found = functools.reduce(dict.__or__, (answer[1][index] for answer in answers))
        assert found == wanted
    if "pipeline_model_parallel_size" in layout:
        # the second stage's layer is its first
        for stage, (_, _, found) in enumerate(answers):
            for name, norm in found.items():
                whole = norms[name.replace("layers.0.", f"layers.{stage}.")]
                assert norm == pytest.approx(whole, rel=1e-4, abs=1e-6), name


def _refused():
    tiny.setup()
    model = _model(PoolConfig(pool_min=2, pool_documents="routers"))
    documents = _documents(BOUNDS)
    packed = tiny.packed(BOUNDS)
    _forward(model, documents)

    def message(call):
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    batch = _batch(1)
    return [
        message(lambda: _forward(model, documents)),
        message(lambda: model(batch["tokens"], batch["position_ids"], None)),
        message(lambda: _forward(model, None)),
        message(lambda: _forward(model, _documents(BOUNDS), packed_seq_params=packed)),
        message(lambda: _forward(model, None, packed_seq_params=packed)),
    ]


def test_stale_missing_and_doubled_boundaries_are_errors(ranks):
    for message in ranks(1).run(_refused)[0]:
        assert "--pool-documents routers" in message


def _without_boundaries():
    from emo_megatron.mcore import batches

    tiny.setup()
    was, batches.get_args = (
        batches.get_args,
        lambda: SimpleNamespace(pool_documents="routers", micro_batch_size=ROWS, seq_length=SEQ),
    )
    try:
        config = tiny.transformer_config()
        batches.get_batch(iter([{"tokens": torch.zeros(ROWS, SEQ)}]), config, None)
    except ValueError as error:
        return str(error)
    finally:
        batches.get_args = was
    return ""


def test_a_batch_without_boundaries_is_an_error(ranks):
    (message,) = ranks(1).run(_without_boundaries)
    assert "--pool-documents routers" in message
    assert "router_bounds" in message


def test_samples_have_the_documents_of_megatrons_own_boundaries(ranks, tmp_path):
    # lengths that, shuffled, end documents on, before and after a sample's last token; the last sample is short and
    # ends with a document of one token
    lengths = [7, 16, 2, 25, 1, 1, 12, 12, 1, 23, 1]
    documents = [[5 + i] * n for i, n in enumerate(lengths)]
    write_indexed_dataset(tmp_path / "text", documents, vocab_size=512)
    run = functools.partial(ranks(1).run, tiny.validation_samples, prefix=tmp_path / "text", cache=tmp_path / "cache")
    (wanted,), (found,) = run(masking=True), run(masking=False)
    assert len(found) == len(wanted) > 3
    for sample, theirs in zip(found, wanted, strict=True):
        assert sample["router_bounds"].tolist() == theirs["cu_seqlens"].tolist()
        assert sample["num_padding"] == theirs["num_padding"]
        assert "cu_seqlens" not in sample
        assert sample["position_ids"].tolist() == list(range(24))
    both = torch.stack([found[0]["router_bounds"], found[1]["router_bounds"]])
    first, second = (sorted({*row.tolist()}) for row in both)
    assert merged_bounds(both).tolist() == [*first[:-1], *(24 + bound for bound in second)]


def test_tokens_of_several_samples_keep_their_documents():
    CLOCK.consumed_samples = 0
    scope = make_scope(
        Packing(cu_seqlens=torch.tensor([0, 1, 4, 8]), tokens_per_sample=4),
        hidden_shape=torch.Size([4, 2, 8]),
        shard=tiny.shard(),
        pool=PoolConfig(pool_min=2),
    )
    CLOCK.consumed_samples = None
    # hidden states are [s, b, h]: the samples' first tokens come first
    assert scope.document_ids_T.tolist() == [0, 2, 1, 2, 1, 2, 1, 2]
    assert scope.sample_positions_D.tolist() == [0, 0, 1]
