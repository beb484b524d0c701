"""The experiments with balance run and leave whole files: a dead expert, and kinds of balance."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import words
from support.benchmarking import BENCHMARKS, rows_of, run_benchmark

from demo.corpus import CorpusConfig, prepare_corpus


@pytest.mark.slow
def test_a_dead_expert_that_gets_no_token_gets_bias_in_every_step(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    done = run_benchmark(
        "revive_expert",
        *("--seeds", 1, "--warmup", 3, "--cap", 12, "--layers", 1, "--experts", 8, "--top-k", 2),
        *("--pool-min", 3, "--pool-max", 4, "--model-dim", 32, "--ffn-dim", 16, "--rows", 1),
        *("--seq-length", 64, "--update-rate", 0.001, "--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path / "revive-expert-frozen.csv")
    assert len(rows) == 3
    for row in rows:
        assert (row["steps"], row["half its share"]) == ("12", "")
        assert float(row["bias at end"]) == pytest.approx(12 * 0.001)
        assert float(row["gate at death"]) < 0.1
    in_no_pool = [row["experts in no pool at end"] for row in rows]
    assert in_no_pool[0] == "", "the standard MoE has no pools"
    # the dead one at least, and never those of the smallest pool
    assert all(1 <= int(number) <= 8 - 3 for number in in_no_pool[1:])
    assert (tmp_path / "revive-expert-frozen.md").read_text().count("| pools by") == 2


def test_pools_of_all_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("megatron.core")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from revive_expert import Options

    with pytest.raises(ValueError, match="--pool-max"):
        Options(pool_max=32)


@pytest.mark.slow
def test_kinds_of_balance_are_trained_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    texts = words.write_alphabets(tmp_path / "texts")
    prepare_corpus(tmp_path / "corpus", CorpusConfig(corpus_dir=texts, min_documents=12, vocab_size=400))
    folders = ("--corpus", tmp_path / "corpus", "--runs", tmp_path / "runs")
    done = run_benchmark("balance_kinds", "--quick", *folders, "--output", tmp_path / "results")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = rows_of(tmp_path / "results" / "balance-kinds-quick.csv")
    found = {(row["run"], row["experts"], row["method"]) for row in rows}
    sizes = {("8", "full"), ("2", "mean_prob"), ("2", "random")}
    assert found == {(run, *s) for run in ("global", "rows", "documents") for s in sizes}
    # one seed, one text: what differs is the balance
    assert len({row["loss"] for row in rows if row["method"] == "full"}) == 3
