"""benchmarks/quantize_module.py: it wants a demo, every job reads what an earlier job leaves, and its table adds up."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
INPUTS = ("--checkpoint", "--stats", "--selection")


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quantize_module")


@pytest.fixture
def options(quantize: Any, tmp_path: Path) -> Any:
    return quantize.Options(run=tmp_path / "run", output=tmp_path / "out", results=tmp_path, domains=("a", "b"))


def test_it_wants_a_demo(quantize: Any, options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    quantize.main(options)
    assert "make demo" in capsys.readouterr().out
    assert not options.output.exists()


def test_every_job_reads_what_is_there(quantize: Any, options: Any) -> None:
    made = {str(options.run / "emo" / "checkpoint")}
    for job in quantize.jobs(options):
        command = job.command
        read = [value for flag, value in itertools.pairwise(command) if flag in INPUTS]
        assert read
        assert made.issuperset(read)
        made.add(command[command.index("--output") + 1])
    assert made.issuperset(str(one.file) for one in quantize.measurements(options))


def test_the_page_names_the_machine(quantize: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options.run.mkdir()
    (options.run / "retention.json").write_text("[]")
    (options.run / "demo.json").write_text('{"seed": 1}')
    monkeypatch.setattr(quantize, "run_jobs", lambda jobs: write_losses(quantize, options))
    described = {"hardware": "an abacus", "torch": "1", "megatron-core": "2"}
    monkeypatch.setattr(quantize, "describe_machine", lambda device, *, threads: described)
    quantize.main(options)
    head, _, table = (options.results / "quantize.md").read_text().partition("\n| ")
    said = dict(line[2:].split(": ", 1) for line in head.splitlines() if line.startswith("- "))
    assert said["hardware"] == "an abacus"
    assert {"transformers", "nvidia-modelopt"} <= said.keys()
    assert table
    written = (options.results / "quantize.md").read_bytes()

    quantize.main(options)  # resumes
    (options.run / "demo.json").write_text('{"seed": 2}')
    with pytest.raises(ValueError, match="seed is 1"):
        quantize.main(options)
    (options.run / "demo.json").write_text('{"seed": 1}')
    others = [dataclasses.replace(options, **{name: 7}) for name in ("tokens", "validation_tokens", "seq_length")]
    for other in [dataclasses.replace(options, keep="50%"), *others]:
        with pytest.raises(ValueError, match="--output"):
            quantize.main(other)
    described["torch"] = "3"
    with pytest.raises(ValueError, match="torch is 1"):
        quantize.main(options)
    described["torch"] = "1"
    (options.output / "demo.json").unlink()
    with pytest.raises(ValueError, match="--output"):
        quantize.main(options)
    assert (options.results / "quantize.md").read_bytes() == written


def test_experts_without_quantisers_are_an_error(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("quantized_loss")

    class TensorQuantizer(torch.nn.Module):
        is_enabled = True

    def quantise(model: torch.nn.Module, config: object, forward_loop: object) -> None:
        model.attention = TensorQuantizer()

    layers = SimpleNamespace(TensorQuantizer=TensorQuantizer)
    package = SimpleNamespace(quantize=quantise, FP8_DEFAULT_CFG={}, nn=layers)
    for name in ("modelopt.torch.quantization", "modelopt.torch", "modelopt"):
        monkeypatch.setitem(sys.modules, name, package)
        package = SimpleNamespace(**{name.rpartition(".")[2]: package})
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization.nn", layers)
    monkeypatch.setattr(module, "find_modelopt", lambda: None)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "9.9")
    model = torch.nn.Module()
    with pytest.raises(ValueError, match="--format fp8"):
        module.quantize(model, "fp8", None)
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.experts = torch.nn.ModuleList([TensorQuantizer()])
    model = torch.nn.ModuleDict({"layer": layer})
    assert module.quantize(model, "fp8", None) == {"quantizers": 2, "quantizers_of_experts": 1}


@pytest.mark.parametrize("step", ["quantize", "loss"])
@pytest.mark.parametrize("word", ["CUDA", "layout"])
def test_a_format_that_needs_a_gpu_is_told_wherever_it_fails(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, word: str
) -> None:
    module = importlib.import_module("quantized_loss")

    def fail(*_: Any) -> None:
        raise AssertionError(f"needs {word}")

    runner = SimpleNamespace(model=None, loss=fail)
    monkeypatch.setattr(module, "is_hugging_face", lambda path: True)
    monkeypatch.setattr(module, "open_hugging_face", lambda *_, **__: (runner, lambda *_: SimpleNamespace(tokens=())))
    counts = {"quantizers": 3, "quantizers_of_experts": 2}
    monkeypatch.setattr(module, "quantize", fail if step == "quantize" else lambda *_: counts)
    paths = dict.fromkeys(("checkpoint", "data", "validation_data", "output"), tmp_path)
    asked = module.Options(format="nvfp4", **paths)
    if word == "layout":
        with pytest.raises(AssertionError, match=word):
            module.measure(asked)
        return
    expected = dict.fromkeys(counts, 0) if step == "quantize" else counts
    assert module.measure(asked) == expected | {"needs_gpu": "needs CUDA"}


def write_losses(quantize: Any, options: Any) -> None:
    for place, one in enumerate(quantize.measurements(options)):
        one.file.parent.mkdir(parents=True, exist_ok=True)
        found = {"quantizers": 3, "quantizers_of_experts": 2}
        found |= {"needs_gpu": "CUDA"} if one.format == "nvfp4" else {"nats": 4.0 + place**2 / 64}
        one.file.write_text(json.dumps(found))


def test_the_loss_increase_is_over_the_same_module_as_stored(quantize: Any, options: Any) -> None:
    write_losses(quantize, options)
    rows = quantize.rows(options)
    # per domain: the parent, and six formats of each of two models
    assert len(rows) == 2 * (1 + 2 * 6)
    first = rows[1]["nats"]
    assert [row.get("increase") for row in rows[:7]] == [None, None, *(row["nats"] - first for row in rows[2:6]), None]
    # the other side has its own stored module
    assert rows[8]["increase"] == rows[8]["nats"] - rows[7]["nats"]
    lines = quantize.page(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "needs a GPU" in lines[8]
    assert f"{rows[2]['increase']:+.4f}" in lines[4]
