"""A folder of results belongs to one setting: a script with other settings must not take up what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import find_demo  # noqa: F401

from demo.recipe import claim


def claim_results(output: Path, settings: dict[str, Any]) -> None:
    """Create the folder of a script and store its settings there.

    ValueError if the folder has other settings, or files and no settings.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / "demo.json").exists():
        raise ValueError(f"--output {output} has results of another release: delete it, or name another folder")
    output.mkdir(parents=True, exist_ok=True)
    claim(output, settings)
