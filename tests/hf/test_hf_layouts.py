"""Conversion with parallel Megatron on both ends: what it saved, exported, imported and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints, words
from support.pretraining import VOCAB, pretrain, stored_tensors
from support.ranks import Ranks

MODEL = (
    *("--num-layers", 2, "--moe-layer-freq", 1, "--group-query-attention", "--num-query-groups", 2),
    *("--norm-epsilon", "1e-6", "--rotary-base", 500000),
)
PARALLEL = (
    *("--tensor-model-parallel-size", 2, "--sequence-parallel"),
    *("--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1),
)
LAYOUTS = {
    "before": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "after": {"pipeline_model_parallel_size": 2},
}
CONFIG = {"num_query_groups": 2}
STOCK = Path(__file__).resolve().parents[1] / "support" / "pretrain_stock.py"


def through_hugging_face(folder: str) -> dict[str, Any]:
    """Export what was trained, as a module with a Selection and measured rows, and import it again."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.commands import export, import_
    from emo_megatron.experts.selection import Selection
    from emo_megatron.report.rows import rows_of, save_rows

    root = Path(folder)
    kept = (0, 1, 2, 3, 5, 8, 9, 11)
    Selection(
        num_experts=12,
        experts=(kept, kept),
        layers=(1, 2),
        method="mean_prob",
        seed=None,
        model="f00d",
        data={"calibration": [{"file": "french.jsonl"}]},
    ).save(root / "trained" / "selection.json")
    measured = [
        {"domain": "french", "evaluated_on": "french", "method": m, "num_experts_kept": k, "keep_fraction": k / 12}
        | {"loss": loss, "tokens": 100}
        for m, k, loss in (("full", 12, 3.0), ("mean_prob", 8, 3.25), ("reap", 8, 3.125), ("random", 8, 4.0))
    ]
    save_rows(rows_of(measured, model="trained", seed=0, versions="test"), root / "rows")
    export.run(
        export.Options(
            checkpoint=root / "trained", output=root / "out", tokenizer=root / "words", retention=root / "rows.json"
        )
    )
    import_.run(import_.Options(folder=root / "out", output=root / "imported", parity_tokens=0))
    before, after = (MegatronCheckpoint(root / name) for name in ("trained", "imported"))
    return {
        "card": (root / "out" / "README.md").read_text(),
        "files": sorted(path.name for path in (root / "out").iterdir()),
        "config": json.loads((root / "out" / "config.json").read_text()),
        "same names": before.names == after.names,
        "tokenizer": (after.args.tokenizer_type, after.args.tokenizer_model),
    }


def check_export(result: dict[str, Any], *, folder: Path, iterations: int) -> None:
    assert result["same names"]
    assert result["config"]["num_key_value_heads"] == 2
    assert result["config"]["emo_megatron"]["pools"] == {"pool_min": 3}
    assert result["config"]["eos_token_id"] == 0
    assert {"selection.json", "tokenizer.json", "README.md"} <= set(result["files"])
    kind, path = result["tokenizer"]
    assert (kind, Path(path)) == ("HuggingFaceTokenizer", folder / "imported" / "tokenizer")
    for told in (f"{iterations} iterations", "| 2 | 0 1 2 3 5 8 9 11 |", "| 8 | 3.250 | 3.000 | +0.250 | 4.000 |"):
        assert told in result["card"], told
    # another method chose other experts
    assert "3.125" not in result["card"]


def test_saved_in_parallel_exported_imported_and_loaded_by_stock_megatron(
    ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    words.write_tokenizer(tmp_path / "words")
    # equal layers, which Megatron stacks, written by two ranks
    sizes = {"num_kv_heads": 2, "num_experts": 8, "renormalise": True, "max_positions": 32}
    folder = str(tmp_path / "trained")
    ranks(2).run(checkpoints.save_run, folder=folder, layout=LAYOUTS["before"], config=CONFIG, **sizes)
    (result,) = ranks(1).run(through_hugging_face, folder=str(tmp_path))
    check_export(result, folder=tmp_path, iterations=7)
    # by Megatron's own layers, under another layout
    loaded = {"layout": LAYOUTS["after"], "config": CONFIG, "stock": True}
    before, after = (
        next(x for x in ranks(2).run(checkpoints.logits, folder=str(tmp_path / name), **loaded) if x is not None)
        for name in ("trained", "imported")
    )
    assert before.abs().max() > 0.5
    assert torch.equal(before, after)


@pytest.mark.slow
def test_trained_in_parallel_exported_imported_and_loaded_by_stock_megatron(
    ranks: Callable[[int], Ranks], data_prefix: Path, tmp_path: Path
) -> None:
    # a checkpoint of equal layers, which Megatron stacks, written by two ranks
    save = ("--ckpt-format", "torch_dist", "--save-interval", 2, "--train-iters", 2)
    trained = tmp_path / "trained"
    pools = ("--pool-min", 3)
    pretrain(2, *MODEL, *PARALLEL, *save, *pools, "--save", trained, data=data_prefix)
    words.write_tokenizer(tmp_path / "words")
    (result,) = ranks(1).run(through_hugging_face, folder=str(tmp_path))
    check_export(result, folder=tmp_path, iterations=2)
    # one step that changes nothing, by Megatron's own layers under another layout, and what it saves
    frozen = ("--lr", 0, "--min-lr", 0, "--weight-decay", 0, "--finetune")
    again = ("--load", tmp_path / "imported", "--save", tmp_path / "again")
    layout = ("--pipeline-model-parallel-size", 2, "--micro-batch-size", 1)
    step = (*save, "--train-iters", 1, "--save-interval", 1)
    pretrain(2, *MODEL, *layout, *step, *frozen, *again, data=data_prefix, script=STOCK)
    before = stored_tensors(trained / "iter_0000002")
    after = stored_tensors(tmp_path / "again" / "iter_0000001")
    weights = [name for name in before if not name.startswith(("optimizer", "rng", "rerun"))]
    assert before["embedding.word_embeddings.weight"].shape[0] == VOCAB
    assert len(weights) == 12
    assert all(before[name].equal(after[name]) for name in weights)
