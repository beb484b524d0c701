"""The parity table sees each mechanism break: a line is changed in a copy of the package, and its case must fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "emo_megatron"
TABLE = "tests/parallel/test_parity.py::test_layout_trains_the_model_of_one_process"

SEEN = (
    "assert decisions ==",
    "assert {layer for",
    "assert {sample for",
    "assert set(chosen) ==",
    "assert {name: value",
    "assert into.setdefault",
)
"""A comparison of the table must fail: a crash would prove nothing."""

MUTATIONS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "nothing: the copy itself passes": ("sharding.py", [], "DP2-recompute-none-mbs1-ga1-running"),
    "context parallelism by sample holds other chunks": (
        "sharding.py",
        [("held = (cp_rank, 2 * cp_size - 1 - cp_rank)", "held = (cp_rank, cp_size + cp_rank)")],
        "CP2 by sample-recompute-none-mbs1-ga1-token",
    ),
    "context parallelism by document holds other chunks": (
        "sharding.py",
        [("2 * cp_size - 2 - cp_rank)", "cp_size - 1 + cp_rank)")],
        "CP2 by document-recompute-moe-mbs1-ga1-token-running",
    ),
    "pools are not summed over the ranks that share a document": (
        "mcore/router.py",
        [("if self.tp_cp_group.size() > 1:", "if self.tp_cp_group.size() > 99:")],
        "TP2 + SP-recompute-full-mbs1-ga1",
    ),
    "load is counted without the other data-parallel ranks": (
        "mcore/losses.py",
        [("reduce_counts(counts_X, group=router.tp_dp_cp_group)", "reduce_counts(counts_X, group=None)")],
        "DP2-recompute-none-mbs1-ga1-running",
    ),
    "the balance loss is averaged over data-parallel ranks, as Megatron's is": (
        "mcore/losses.py",
        [("else num_ranks", "else 1")],
        "DP2-recompute-none-mbs1-ga1-running",
    ),
    "recomputation counts the load of a micro-batch twice": (
        "mcore/losses.py",
        [("scope is None or router.layer_number not in scope.counts", "True")],
        "PP2-recompute-full-mbs1-ga4-running",
    ),
    "recomputation reads what the module saw last": (
        "mcore/layer.py",
        [("            self.scope = scope\n", ""), ("scope, self.scope = self.scope, None", "scope = self.scope")],
        "PP2-recompute-moe-mbs2-ga4-token",
    ),
    "every data-parallel rank takes itself for the first": (
        "mcore/context.py",
        [("shard.microbatch * shard.dp_size + shard.dp_rank", "shard.microbatch * shard.dp_size")],
        "DP2-recompute-none-mbs1-ga1-running",
    ),
    "every micro-batch takes itself for the first": (
        "mcore/layer.py",
        [('getattr(self, "current_microbatch", 0) or 0', "0")],
        "PP2-recompute-full-mbs1-ga4-running",
    ),
    "experts of a document are counted on every rank that holds a part of it": (
        "mcore/metrics.py",
        [("is_split = self.tp_cp_group.size() > 1", "is_split = False")],
        "TP2 + SP-recompute-full-mbs1-ga1",
    ),
    "documents are logged without those of other data-parallel ranks": (
        "mcore/metrics.py",
        [("reduce_counts(own_LS, group=self.tp_dp_cp_group)", "reduce_counts(own_LS, group=None)")],
        "DP2-recompute-none-mbs1-ga1-running",
    ),
    "choices of a document are balanced on every rank that holds a part of it": (
        "mcore/losses.py",
        [("reduce_counts(choices_DE, group=router.tp_cp_group)", "reduce_counts(choices_DE, group=None)")],
        "TP2 + SP, groups and biased pools-recompute-moe-mbs1-ga2-token",
    ),
    "the bias counts for the tokens of one rank": (
        "mcore/router.py",
        [("scores_DE, tokens_D1[:, 0], self.expert_bias", "scores_DE, tokens_D, self.expert_bias")],
        "CP2 by document, groups and biased pools-recompute-full-mbs1-ga1-token",
    ),
    "aux_loss is of all data-parallel ranks": (
        "mcore/losses.py",
        [
            (
                "reduce_counts(own_X, group=self.router.tp_cp_group)",
                "reduce_counts(own_X, group=self.router.tp_dp_cp_group)",
            )
        ],
        "DP2, aux_loss of each rank-recompute-none-mbs2-ga2",
    ),
    "the router sees samples in Megatron's order": (
        "mcore/layer.py",
        [
            (
                "return hidden_states, padding_mask, None",
                "return super()._maybe_unflatten_for_moe(hidden_states, padding_mask, packed_seq_params)",
            )
        ],
        "DP2-recompute-none-mbs1-ga1-running",
    ),
    "the size of a pool is drawn from where padding has moved its document": (
        "mcore/context.py",
        [
            (
                "        segments=segments,\n        document_ids_T=ids_T,",
                "        segments=segments if bounds is None else DocumentSegments(\n"
                "            document_ids_T=segments.document_ids_T,\n"
                "            starts_D=segments.starts_D,\n"
                "            tokens_per_sample=segments.tokens_per_sample,\n"
                "            real_starts_D=bounds[: segments.num_documents].long(),\n"
                "        ),\n        document_ids_T=ids_T,",
            )
        ],
        "CP2, documents padded-recompute-full-mbs2-ga2",
    ),
    "padding behind documents has a vote": (
        "mcore/context.py",
        [(".masked_fill(places_T < 0, -1)", "")],
        "CP2, documents padded-recompute-full-mbs2-ga2",
    ),
    "positions vote for what is not in their document": (
        "mcore/context.py",
        [("if depth == 0 or self.attended_ids_T is None:", "if True:")],
        "CP2, multi-token prediction-recompute-full-mbs2-ga1",
    ),
    "layers of multi-token prediction are numbered from 1": (
        "mcore/router.py",
        [("layer_number + self.config.num_layers * self.is_mtp_layer", "layer_number")],
        "CP2, multi-token prediction-recompute-full-mbs2-ga1",
    ),
    "the loss of multi-token prediction is divided by the tokens of one rank": (
        "mcore/mtp_loss.py",
        [("    if cp_size > 1:", "    if cp_size > 99:")],
        "CP2, multi-token prediction-recompute-full-mbs2-ga1",
    ),
    "recomputation takes depths in the order of forward": (
        "mcore/mtp.py",
        [("return num_depths + 1 - self._num_backward", "return self._num_backward")],
        "CP2, one layer of multi-token prediction-recompute-full-mbs2-ga2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_seen(name, tmp_path):
    file, changes, case = MUTATIONS[name]
    for folder in (PACKAGE, "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / PACKAGE / file
    text = path.read_text()
    for before, after in changes:
        assert text.count(before) == 1, f"{before!r} is not one line of {file} any more"
        text = text.replace(before, after)
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"{TABLE}[{case}]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if not changes:
        assert done.returncode == 0, done.stdout[-2000:]
        return
    assert done.returncode == 1, done.stdout[-2000:]
    assert any(f"       {line}" in done.stdout for line in SEEN), done.stdout[-2000:]
