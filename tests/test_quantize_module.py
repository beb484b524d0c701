"""benchmarks/quantize_module.py: it wants a demo, every job reads what an earlier job leaves, and its table adds up."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

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


def test_the_loss_increase_is_over_the_same_module_as_stored(quantize: Any, options: Any) -> None:
    for place, one in enumerate(quantize.measurements(options)):
        one.file.parent.mkdir(parents=True, exist_ok=True)
        found = {"quantizers": 3, "quantizers_of_experts": 2}
        found |= {"needs_gpu": "CUDA"} if one.format == "nvfp4" else {"nats": 4.0 + place**2 / 64}
        one.file.write_text(json.dumps(found))
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
