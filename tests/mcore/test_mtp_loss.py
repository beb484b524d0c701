"""The losses of multi-token prediction against their definition written out, however ranks share the tokens."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper, process_mtp_loss
from support import tiny

from emo_megatron.mcore import mtp_loss
from emo_megatron.mcore.mtp_loss import exact_mtp_loss
from emo_megatron.sharding import local_token_indices

DEPTHS, FACTOR, HIDDEN, WORDS = 2, 0.3, 8, 11
LENGTHS = [4, 8, 4, 16, 8, 8]
"""Documents of a micro-batch, whose first three are one half, with shorter documents, and the others the second."""
TOLERANCE = 1e-6
"""Of a tensor's norm; float32."""


def _deviation(got, want):
    return float((got - want).norm() / want.norm())


def _micro_batch(lengths, seed=0):
    """Tensors of a packed micro-batch: of the main loss, every second token counts, and of the first document none."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    is_counted = torch.arange(num_tokens) % 2 == 0
    is_counted[: lengths[0]] = False
    return {
        "hidden": torch.randn(1 + DEPTHS, num_tokens, HIDDEN, generator=generator),
        "labels": torch.randint(WORDS, (1, num_tokens), generator=generator),
        "loss_mask": is_counted.float()[None],
        "lengths": lengths,
    }


def _taken(batch, tokens, lengths):
    """Some tokens of a micro-batch."""
    return {
        "hidden": batch["hidden"][:, tokens],
        "labels": batch["labels"][:, tokens],
        "loss_mask": batch["loss_mask"][:, tokens],
        "lengths": lengths,
    }


def _weight():
    return torch.randn(WORDS, HIDDEN, generator=torch.Generator().manual_seed(9))


def _run(loss_function, batch, *, per_token=False, cp_group=None, **overrides):
    """Gradients of the micro-batch's hidden states and of the output layer, and what this rank logs of each depth."""
    layer = torch.nn.Linear(HIDDEN, WORDS, bias=False)
    layer.weight.data = _weight()
    hidden = batch["hidden"].clone().requires_grad_()

    def output_layer(tokens, weight, runtime_gather_output):
        return F.linear(tokens, layer.weight if weight is None else weight), None

    def compute_loss(labels, logits):
        losses = F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
        assert losses.shape == labels.shape
        return losses

    output_layer.weight, output_layer.gather_output = layer.weight, True
    MTPLossLoggingHelper.tracker.clear()
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    options = {
        "hidden_states": hidden.view(-1, 1, HIDDEN),
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
        "output_layer": output_layer,
        "output_weight": None,
        "runtime_gather_output": None,
        "is_training": True,
        "compute_language_model_loss": compute_loss,
        "config": SimpleNamespace(
            mtp_num_layers=DEPTHS,
            mtp_loss_scaling_factor=FACTOR,
            calculate_per_token_loss=per_token,
            mtp_detach_heads=overrides.pop("mtp_detach_heads", False),
        ),
        "cp_group": cp_group,
        "tp_group": None,
        "packed_seq_params": tiny.packed([0, *torch.tensor(batch["lengths"]).cumsum(0).tolist()]),
        "input_ids": None,
    }
    known = inspect.signature(process_mtp_loss).parameters
    output = loss_function(**{k: v for k, v in (options | overrides).items() if k in known})
    assert torch.equal(output, hidden[0][:, None])
    output.backward(torch.zeros_like(output))
    reduce = getattr(MTPLossLoggingHelper, "reduce_metrics_in_tracker", None)
    if reduce is None:
        reduce = MTPLossLoggingHelper.reduce_loss_in_tracker
    reduce()
    tracker = MTPLossLoggingHelper.tracker
    found = {name: tracker[name].tolist() for name in tracker if name.endswith("values")}
    found["losses"] = found.pop("loss_values", found.pop("values", None))
    return found | {"hidden": hidden.grad, "weight": layer.weight.grad}


def _defined(batch):
    """Sum and number of the losses of each depth, and their gradients' sum times Megatron's factor."""
    hidden = batch["hidden"].clone().requires_grad_()
    weight = _weight().requires_grad_()
    sums, counts = [], []
    for depth in range(1, 1 + DEPTHS):
        losses = []
        start = 0
        for length in batch["lengths"]:
            for place in range(start, start + length - depth):
                if batch["loss_mask"][0, place + depth]:
                    logits = hidden[depth, place] @ weight.T
                    losses.append(F.cross_entropy(logits, batch["labels"][0, place + depth]))
            start += length
        sums.append(torch.stack(losses).sum())
        counts.append(len(losses))
    (sum(sums) * FACTOR / DEPTHS).backward()
    return SimpleNamespace(
        sums=torch.stack(sums).detach(),
        counts=torch.tensor(counts),
        hidden=hidden.grad,
        weight=weight.grad,
        num_tokens=int(batch["loss_mask"].sum()),
    )


def _losses(whose, **options):
    """On one rank: the loss of the whole micro-batch."""
    tiny.setup()
    return _run(_loss_function(whose), _micro_batch(LENGTHS), **options)


def _loss_function(name):
    return {"exact": exact_mtp_loss, "megatron": process_mtp_loss}[name]


@pytest.mark.parametrize("per_token", [False, True])
def test_divides_by_the_tokens_of_the_main_loss(ranks, per_token):
    want = _defined(_micro_batch(LENGTHS))
    share = 1 if per_token else 1 / want.num_tokens
    got, megatrons = (ranks(1).run(_losses, whose=name, per_token=per_token)[0] for name in ("exact", "megatron"))
    for name in ("hidden", "weight"):
        assert _deviation(got[name], share * getattr(want, name)) < TOLERANCE
        # whose divisors are the depths' own
        assert _deviation(megatrons[name], share * getattr(want, name)) > 0.01
    assert got["losses"] == pytest.approx((want.sums / want.counts).tolist())
    assert got["losses"] == pytest.approx(megatrons["losses"])
    for name in ("correct_values", "total_values"):
        assert got.get(name) == megatrons.get(name)


def _halves(whose, **options):
    """On one rank: the losses of the micro-batch's halves, of equally many tokens of the main loss."""
    tiny.setup()
    batch = _micro_batch(LENGTHS)
    split = sum(LENGTHS[:3])
    batch["loss_mask"][:, split + 12 :] = 0
    first = _taken(batch, slice(0, split), LENGTHS[:3])
    second = _taken(batch, slice(split, None), LENGTHS[3:])
    assert first["loss_mask"].sum() == second["loss_mask"].sum()
    return [_run(_loss_function(whose), part, **options) for part in (batch, first, second)]


@pytest.mark.parametrize("per_token", [False, True])
def test_halves_of_a_micro_batch_add_up(ranks, per_token):
    """As two data-parallel ranks or two micro-batches would have it."""
    for whose in ("exact", "megatron"):
        whole, first, second = ranks(1).run(_halves, whose=whose, per_token=per_token)[0]
        # means of halves are averaged
        share = 1 if per_token else 2
        together = {
            "hidden": torch.cat([first["hidden"], second["hidden"]], dim=1) / share,
            "weight": (first["weight"] + second["weight"]) / share,
        }
        for name, got in together.items():
            deviation = _deviation(got, whole[name])
            assert deviation < TOLERANCE if whose == "exact" else deviation > 0.01


def _cut(whose, **options):
    """On two context-parallel ranks: each rank's part of the micro-batch."""
    tiny.setup(context_parallel_size=2)
    group = parallel_state.get_context_parallel_group()
    held = local_token_indices(
        num_tokens=sum(LENGTHS), cp_rank=group.rank(), cp_size=2, document_bounds=torch.tensor([0, *LENGTHS]).cumsum(0)
    )
    part = _taken(_micro_batch(LENGTHS), held, LENGTHS)
    return held, _run(_loss_function(whose), part, cp_group=group, **options)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("whose", ["exact", "megatron"])
def test_context_parallel_ranks_add_up(ranks, whose, per_token):
    (whole,) = ranks(1).run(_losses, whose=whose, per_token=per_token)
    answers = ranks(2).run(_cut, whose=whose, per_token=per_token)
    # Megatron adds gradients per token up, and averages the others
    share = 1 if per_token else 2
    weight = sum(part["weight"] for _, part in answers) / share
    hidden = torch.zeros_like(whole["hidden"])
    for held, part in answers:
        hidden[:, held] = part["hidden"] / share
    deviations = [_deviation(weight, whole["weight"]), _deviation(hidden, whole["hidden"])]
    losses = [part["losses"] for _, part in answers]
    if whose == "exact":
        assert max(deviations) < TOLERANCE
        assert losses == [pytest.approx(whole["losses"])] * 2
    else:
        assert min(deviations) > 1e-3
        assert losses != [pytest.approx(whole["losses"])] * 2


def _data_parallel():
    """On two data-parallel ranks: a micro-batch each, of different lengths."""
    tiny.setup()
    rank = torch.distributed.get_rank()
    return _run(_loss_function("exact"), _micro_batch(LENGTHS[3 * rank :], seed=rank))["losses"]


def test_logs_the_mean_over_all_ranks_tokens(ranks):
    parts = [_defined(_micro_batch(LENGTHS[3 * rank :], seed=rank)) for rank in range(2)]
    want = sum(part.sums for part in parts) / sum(part.counts for part in parts)
    assert ranks(2).run(_data_parallel) == [pytest.approx(want.tolist())] * 2


def _special():
    """On one rank: the cases in which Megatron's behaviour is kept, of both functions."""
    tiny.setup()
    batch = _micro_batch(LENGTHS)
    found = {}
    for name in ("exact", "megatron"):
        run = functools.partial(_run, _loss_function(name), batch)
        found[name] = {
            "labels of input ids": run(labels=None, input_ids=batch["labels"]),
            "detached": run(mtp_detach_heads=True),
            "evaluation": run(is_training=False),
            "no mask": run(loss_mask=None),
            "nothing counted": run(loss_mask=torch.zeros_like(batch["loss_mask"])),
            "scaled": run(scale_logits_fn=lambda logits: logits * 0.5),
        }
    return found


def test_is_megatrons_where_nothing_is_divided_otherwise(ranks):
    (found,) = ranks(1).run(_special)
    got, want = found["exact"], found["megatron"]
    case = "labels of input ids"
    assert torch.equal(got[case]["hidden"], want[case]["hidden"])
    assert got[case]["losses"] == want[case]["losses"] != [0.0] * DEPTHS
    assert got["detached"]["weight"] is None
    assert want["detached"]["weight"] is None
    assert got["detached"]["hidden"].abs().sum() > 0
    assert got["evaluation"]["losses"] is None
    for case in ("no mask", "scaled"):
        assert got[case]["losses"] == pytest.approx(want[case]["losses"])
    assert not got["nothing counted"]["hidden"].any()
    assert got["nothing counted"]["losses"] == [0.0] * DEPTHS


def test_takes_the_place_of_megatrons_loss(monkeypatch):
    for module in mtp_loss._CALLERS:
        monkeypatch.setattr(module, "process_mtp_loss", mtp_loss._HOST_LOSS)
    for is_exact, want in ((True, mtp_loss.exact_mtp_loss), (False, mtp_loss._HOST_LOSS)):
        for _ in range(2):
            mtp_loss.use_exact_mtp_loss(is_exact)
            assert all(module.process_mtp_loss is want for module in mtp_loss._CALLERS)


def test_another_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(mtp_loss, "_HOST_LOSS", lambda hidden_states, labels: None)
    with pytest.raises(ValueError, match="--mtp-exact-loss"):
        mtp_loss.use_exact_mtp_loss()
    monkeypatch.undo()
    monkeypatch.setattr(mtp_loss, "_CALLERS", (SimpleNamespace(__name__="some_model"),))
    with pytest.raises(ValueError, match="--mtp-exact-loss"):
        mtp_loss.use_exact_mtp_loss()
