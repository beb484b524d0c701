"""docs/parallelism.md lists what is refused, as the table in the code does."""

from __future__ import annotations

from pathlib import Path

from emo_megatron.config import flag
from emo_megatron.mcore.unsupported import CONFIG_REFUSALS, DEDUP_REFUSALS, PLACEMENT_REFUSALS, SCRIPT_REFUSALS

ROOT = Path(__file__).resolve().parents[2]


def refusal_rows():
    """The rows of the page's last table."""
    for refusal in (*CONFIG_REFUSALS, *DEDUP_REFUSALS, *PLACEMENT_REFUSALS, *SCRIPT_REFUSALS):
        allowed = [str(a) for a in refusal.allowed if a is not None]
        must = " or ".join(allowed + ["not given"] * (None in refusal.allowed))
        who = " (`pretrain_emo.py`)" if refusal in SCRIPT_REFUSALS else ""
        who = " (`--pool-dispatcher dedup`)" if refusal in DEDUP_REFUSALS else who
        who = " (`--expert-placement`)" if refusal in PLACEMENT_REFUSALS else who
        yield f"| `{refusal.flag or flag(refusal.field)}`{who} | {must} | {refusal.kind} | {refusal.reason} |"


def test_the_page_lists_what_is_refused():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    listed = page.split("## Refused")[1].strip().splitlines()
    assert listed[-len(list(refusal_rows())) :] == list(refusal_rows())
