"""Input that long contexts and multi-token prediction make hard: handled exactly, or an error that names the flag."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from support.pretraining import VOCAB, logged, pretrain
from support.recorded_runs import differences, run

SEQ = 16
CP2 = ("--context-parallel-size", 2)
DEPTHS = 3
MTP = ("--mtp-num-layers", DEPTHS, "--mtp-loss-scaling-factor", 0.3, "--mtp-exact-loss")
OWN_STAGE = ("--pipeline-model-parallel-size", 3, "--pipeline-model-parallel-layout", "Ett|ttmmm|L")


def _get_batch(change, kind, cp=1, **flags):
    """The tokens that the script makes of a sample with this change, or its error."""
    from megatron.training import global_vars
    from support import tiny

    from emo_megatron.mcore import batches
    from emo_megatron.mcore.batches import NUM_PADDING, ROUTER_BOUNDS

    tiny.setup(context_parallel_size=cp)
    bounds = ROUTER_BOUNDS if kind == "routers" else "cu_seqlens"
    sample = {
        **{key: torch.arange(SEQ)[None] for key in batches.TOKEN_KEYS},
        bounds: torch.tensor([[0, 5, SEQ]], dtype=torch.int32),
        "max_seqlen": torch.tensor([SEQ]),
        NUM_PADDING: torch.zeros(1, dtype=torch.int64),
    }
    if kind == "neither":
        del sample[bounds]
    for key, value in change.items():
        sample[bounds if key == "bounds" else key] = value
    global_vars._GLOBAL_ARGS = SimpleNamespace(
        pool_documents=kind,
        dataloader_inter_document_masking=kind == "attention",
        micro_batch_size=1,
        seq_length=SEQ,
        context_parallel_size=cp,
        pipeline_model_parallel_size=1,
        sequence_parallel=False,
        **flags,
    )
    try:
        return batches.get_batch(iter([sample]), tiny.transformer_config(), None)["tokens"].tolist()
    except ValueError as error:
        return str(error)
    finally:
        global_vars._GLOBAL_ARGS = None


HALF = torch.arange(SEQ // 2)[None]


@pytest.mark.parametrize("kind", ["attention", "routers"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), HALF), "--seq-length"),
        ({"labels": HALF}, "--seq-length"),
        ({"bounds": torch.tensor([[0, 5, SEQ // 2]], dtype=torch.int32)}, "cu_seqlens"),
        ({"cu_seqlens_padded": torch.tensor([[0, 8, SEQ]])}, "cu_seqlens_padded"),
    ],
    ids=["everything cut", "labels cut", "boundaries cut", "padded"],
)
def test_a_loader_that_cuts_or_pads_is_refused(ranks, kind, change, says):
    message = ranks(1).run(_get_batch, change=change, kind=kind)[0]
    assert isinstance(message, str)
    assert says in message


@pytest.mark.parametrize("kind", ["attention", "routers"])
def test_whole_samples_are_taken(ranks, kind):
    assert ranks(1).run(_get_batch, change={}, kind=kind)[0] == [list(range(SEQ))]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        # documents of 5 and 11 tokens, padded to 8 and 12; 0 is the first token, and padding
        ("attention", [[0, 1, 0, 0, 5, 6, 7, 14, 15, 0], [2, 3, 4, 0, 8, 9, 10, 11, 12, 13]]),
        ("routers", [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]),
        ("neither", [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]),
    ],
)
def test_each_rank_holds_its_part(ranks, kind, parts):
    """The standard model too, which may have no boundaries at all."""
    found = ranks(2).run(_get_batch, change={}, kind=kind, cp=2)
    assert found == [[part] for part in parts]


def test_a_micro_batch_of_too_many_documents_is_an_error(ranks):
    three = {"bounds": torch.tensor([[0, 1, 2, SEQ]], dtype=torch.int32)}
    (short, _), (long, _) = (
        ranks(2).run(_get_batch, change=three, kind="attention", cp=2, max_documents=most) for most in (1, 3)
    )
    assert "--max-documents" in short
    # three documents need 16 + 3 * 3 tokens at most, which two ranks can share if they are 28
    assert len(long[0]) == 14


def test_the_share_of_padding_is_told():
    from megatron.training import global_vars

    from emo_megatron.mcore import batches, train
    from emo_megatron.mcore.batches import NUM_PADDING

    mask = torch.ones(1, 12)
    batch = {NUM_PADDING: torch.zeros(1), "loss_mask": mask, batches.PADDED_TOKENS: 24}
    global_vars._GLOBAL_ARGS = SimpleNamespace(
        seq_length=SEQ, calculate_per_token_loss=True, check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False
    )
    try:
        padding = train._padding(batch)
        _, _, report = train.loss_func(mask, mask, padding=padding)
        with torch.no_grad():
            _, _, of_evaluation = train.loss_func(mask, mask, padding=padding)
    finally:
        global_vars._GLOBAL_ARGS = None
    assert report["padding share"].tolist() == [8, 24]
    assert "padding share" not in of_evaluation
    assert train._padding(batch | {"loss_mask": None}) is None


@pytest.mark.slow
def test_a_sequence_that_cannot_be_cut_is_named(data_prefix):
    """By Megatron, which wants whole samples cut too, though documents are padded one by one."""
    output = pretrain(2, *CP2, "--seq-length", 62, data=data_prefix, expect_failure=True)
    assert "seq-length should be a multiple of 2 * context-parallel-size" in output


def _write(folder, lengths):
    """A dataset of documents of so many tokens, end-of-document included."""
    from emo_megatron.mcore.dataset import write_indexed_dataset

    documents = [[(n * i) % (VOCAB - 1) for i in range(n - 1)] + [VOCAB - 1] for n in lengths]
    write_indexed_dataset(folder / "text", documents, vocab_size=VOCAB)
    return folder / "text"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "counted"),
    [
        # three of four samples have no boundary inside
        ([4 * 64] * 20, [True] * DEPTHS),
        # nothing lies further on in its document than one token
        ([2] * 1200, [True, False, False]),
        ([1] * 2400, [False] * DEPTHS),
    ],
    ids=["longer than a sample", "shorter than a depth", "of one token"],
)
def test_documents_of_any_length_train_the_run_of_one_process(lengths, counted, tmp_path):
    data = _write(tmp_path, lengths)
    want = run(1, *MTP, data=data, folder=tmp_path / "one")
    got = run(2, *MTP, *CP2, data=data, folder=tmp_path / "two")
    assert differences(got, want) == set()
    assert all(map(math.isfinite, got["losses"]))
    for depth, is_counted in enumerate(counted, start=1):
        losses = logged(got["output"], f"mtp_{depth} loss")
        assert losses == pytest.approx(logged(want["output"], f"mtp_{depth} loss"), rel=1e-6)
        assert all((loss > 0) == is_counted for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_prediction_before_the_last_stage_shares_the_embedding(is_tied, data_prefix, tmp_path):
    want = run(1, *MTP, data=data_prefix, folder=tmp_path / "one", is_tied=is_tied)
    got = run(3, *MTP, *OWN_STAGE, data=data_prefix, folder=tmp_path / "three", is_tied=is_tied)
    assert differences(got, want) == set()
