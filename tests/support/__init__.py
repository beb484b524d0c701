"""What tests share: live ranks, tiny models, routing written as loops."""

from __future__ import annotations

import pytest

PARITY_TABLE = pytest.StashKey[list[str]]()
"""Lines of the parity table, printed at the end of the run that made it."""
