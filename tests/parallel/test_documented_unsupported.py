"""docs/parallelism.md lists what is not supported, as the tables in the code do."""

from __future__ import annotations

from pathlib import Path

from emo_megatron.config import flag
from emo_megatron.mcore.unsupported import CONVERSATIONS, DEDUP, MODEL, PLACEMENT, SCRIPT, SELECTION

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "": MODEL,
    " (`--pool-dispatcher dedup`)": DEDUP,
    " (`--train-selection`)": SELECTION,
    " (`--expert-placement`)": PLACEMENT,
    " (`pretrain_emo.py`)": SCRIPT,
    " (`pretrain_emo.py --sft`)": CONVERSATIONS,
}


def unsupported_rows():
    """The rows of the page's last table."""
    for who, rows in TABLES.items():
        for row in rows:
            allowed = [str(a) for a in row.allowed if a is not None]
            must = " or ".join(allowed + ["not given"] * (None in row.allowed))
            kind = "untried" if row.is_untried else "impossible"
            yield f"| `{row.flag or flag(row.field)}`{who} | {must} | {kind} | {row.reason} |"


def test_the_page_lists_what_is_refused():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    listed = page.split("### Single options")[1].strip().splitlines()
    assert listed[-len(list(unsupported_rows())) :] == list(unsupported_rows())
