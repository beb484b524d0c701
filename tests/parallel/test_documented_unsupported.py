"""docs/parallelism.md lists what is not supported, as the tables in the code do."""

from __future__ import annotations

from pathlib import Path

from emo_megatron.config import flag
from emo_megatron.mcore.unsupported import CONVERSATIONS, DEDUP, HOST, MODEL, PLACEMENT, SCRIPT, SELECTION

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "": MODEL,
    "`--pool-dispatcher dedup`": DEDUP,
    "`--train-selection`": SELECTION,
    "`--expert-placement`": PLACEMENT,
    "`pretrain_emo.py` and Megatron's scripts": [row for row in SCRIPT if row in HOST],
    "`pretrain_emo.py`": [row for row in SCRIPT if row not in HOST],
    "`pretrain_emo.py --sft`": CONVERSATIONS,
    "Megatron's scripts": [row for row in HOST if row not in SCRIPT],
}
FLAG = {"False": "not given", "True": "given"}
"""Flags without a value."""


def unsupported_rows():
    """The rows of the page's last table."""
    for who, rows in TABLES.items():
        for row in rows:
            allowed = [FLAG.get(str(a), str(a)) for a in row.allowed if a is not None]
            must = " or ".join(allowed + ["not given"] * (None in row.allowed))
            kind = "not implemented" if row.is_untried else "impossible"
            runs = ", ".join([who] * bool(who) + ["with pools"] * row.only_with_pools)
            name = row.flag or flag(row.field)
            name = f"`{name}`" if name.startswith("--") else name
            yield f"| {name}{f' ({runs})' * bool(runs)} | {must} | {kind} | {row.reason} |"


def test_the_page_lists_what_is_refused():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    listed = page.split("### Single options")[1].strip().splitlines()
    assert listed[listed.index("|---|---|---|---|") + 1 :] == list(unsupported_rows())
