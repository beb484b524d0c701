"""benchmarks/train_lora.py: documents stay apart, the learning rate is Megatron's, and the adapter fits its folder."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import decoder, lora
from support.benchmarking import BENCHMARKS

from emo_megatron.hf.folder import HuggingFaceFolder

pytest.importorskip("peft")
pytest.importorskip("megatron.core")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_lora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.write_folder(tmp_path_factory.mktemp("base") / "base")


DOCUMENTS = [torch.arange(10, 13), torch.arange(20, 27), torch.arange(30, 32), torch.arange(40, 47)]


def test_rows_are_cut_from_the_documents_in_order(script: Any) -> None:
    first, again = itertools.islice(script.batches(DOCUMENTS, rows=3, seq_length=5), 2)
    assert first.tokens_BS.tolist() == [[10, 11, 12, 20, 21], [22, 23, 24, 25, 26], [30, 31, 40, 41, 42]]
    # the last token of a row predicts the next row's first
    no = script.IGNORED
    assert first.labels_BS.tolist() == [[11, 12, no, 21, 22], [23, 24, 25, 26, no], [31, no, 41, 42, 43]]
    assert first.positions_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]
    # four tokens are left, which are no step
    assert torch.equal(first.tokens_BS, again.tokens_BS)
    with pytest.raises(ValueError, match=r"--data .*20 .*19"):
        next(script.batches(DOCUMENTS, rows=4, seq_length=5))


def test_no_token_sees_another_document(script: Any, base: Path) -> None:
    model = lora.load(base)
    batch = next(script.batches(DOCUMENTS, rows=3, seq_length=5))
    pieces = [([10, 11, 12], [11, 12]), ([20, 21], [21, 22]), ([22, 23, 24, 25, 26], [23, 24, 25, 26])]
    pieces += [([30, 31], [31]), ([40, 41, 42], [41, 42, 43])]
    losses = [
        torch.nn.functional.cross_entropy(lora.logits(model, torch.tensor(tokens))[: len(labels)], torch.tensor(labels))
        * len(labels)
        for tokens, labels in pieces
    ]
    wanted = sum(losses) / sum(len(labels) for _, labels in pieces)
    torch.testing.assert_close(script.loss_of(model, batch).detach(), wanted, rtol=1e-5, atol=1e-5)
    # as in a row that is one document
    joined = torch.arange(5).expand(3, 5)
    other = script.Batch(tokens_BS=batch.tokens_BS, labels_BS=batch.labels_BS, positions_BS=joined)
    assert (script.loss_of(model, other) - wanted).abs() > 1e-2


def test_the_learning_rate_is_megatrons(script: Any) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [weight], "max_lr": 2.0, "min_lr": 0.2}], lr=2.0)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=2.0,
        min_lr=0.2,
        lr_warmup_steps=4 * 16,
        lr_decay_steps=60 * 16,
        lr_decay_style="linear",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=60 * 16,
        wd_incr_style="constant",
    )
    for step in range(60):
        wanted = optimizer.param_groups[0]["lr"]
        assert 2.0 * script.share_of_rate(step, steps=60, warmup=4) == pytest.approx(wanted)
        scheduler.step(16)


def test_the_adapter_fits_its_folder(script: Any, base: Path, tmp_path: Path) -> None:
    from emo_megatron.hf import adapter
    from emo_megatron.mcore.dataset import write_indexed_dataset

    write_indexed_dataset(tmp_path / "data", [document.tolist() for document in DOCUMENTS], vocab_size=80)
    options = script.Options(
        folder=base,
        data=tmp_path / "data",
        output=tmp_path / "adapter",
        steps=4,
        rows=3,
        seq_length=5,
        warmup=1,
        lr=1e-2,
    )
    script.main(options)
    # the fingerprint counts, wherever the folder was
    lora.edit(tmp_path / "adapter", base_model_name_or_path="elsewhere")
    before = load_file(base / "model.safetensors")
    with adapter.merged(HuggingFaceFolder(base), tmp_path / "adapter", output=tmp_path / "out") as merged:
        changed = {name for name in before if not torch.equal(merged.read(name), before[name])}
    assert changed == {name for name in before if ".experts." in name}
    with pytest.raises(ValueError, match="exists"):
        script.main(options)
