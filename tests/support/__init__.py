"""What tests share: live ranks, tiny models, routing written as loops."""

from __future__ import annotations

import pytest

PARITY_TABLE = pytest.StashKey[list[str]]()
"""Lines of the parity table, printed at the end of the run that made it."""

DECISIONS = (
    *("pools", "pools on the edge", "pools that differ"),
    *("choices", "choices on the edge", "choices that differ"),
)
"""Properties that tests of the compiled ops record, summed at the end of a run. The edge: closer than rounding."""
