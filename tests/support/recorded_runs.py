"""Runs of examples/pretrain_emo.py that write down what their routers decided, and what two of them differ in."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from support.pretraining import ROOT, logged, pretrain

SCRIPT = ROOT / "tests" / "support" / "pretrain_recorded.py"
TOLERANCE = 1e-6
"""Of a loss, of which Megatron prints seven digits."""


def run(processes: int, *flags: Any, data: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """What such a run logs and decides: losses and pool sizes of all steps, decisions, their margin, its output."""
    folder.mkdir()
    flags = ("--pool-min", 3, "--record", folder, *flags)
    output = pretrain(processes, *flags, data=data, script=SCRIPT, **options)
    decisions: dict[Any, Any] = {}
    margins = []
    for path in sorted(folder.iterdir()):
        content = ast.literal_eval(path.read_text())
        margins.append(float(content["margin"]))
        for key, chosen in content["decisions"].items():
            into = decisions.setdefault(key, {})
            # ranks that saw the same document or token must have decided alike
            assert all(into.setdefault(place, found) == found for place, found in chosen.items())
    return {
        "losses": logged(output),
        "further losses": logged(output, "mtp_1 loss"),
        "pool sizes": logged(output, "pool_size"),
        "validation losses": logged(output, "lm loss value"),
        "decisions": decisions,
        "margin": min(margins),
        "output": output,
    }


def differences(got: dict[str, Any], want: dict[str, Any]) -> set[str]:
    """The names of what is not the same."""
    is_equal = {
        kind: got[kind] == pytest.approx(want[kind], rel=TOLERANCE)
        for kind in ("losses", "further losses", "pool sizes", "validation losses")
    }
    is_equal["decisions"] = got["decisions"] == want["decisions"]
    return {name for name, equal in is_equal.items() if not equal}
