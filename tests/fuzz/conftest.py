"""A folder of small valid files, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.inputs import write_inputs


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `write_inputs` wrote; whoever changes a file puts it back."""
    folder = tmp_path_factory.mktemp("fuzz") / "files"
    folder.mkdir()
    return write_inputs(folder)
