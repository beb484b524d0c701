"""Bridge runs in processes of its own, whose path begins with the folder that `make` installs it into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = ROOT / ".venv" / "megatron-bridge-0.6.2"


@pytest.fixture(scope="session")
def run_bridge():
    """Runs a script or `-m module` of this project beside Bridge and gives its output; an error if it fails."""
    if not BRIDGE.is_dir():
        pytest.skip(f"needs {BRIDGE.relative_to(ROOT)}: make test installs it")

    def run(*args, expect_failure=False, launcher=(), **variables):
        path = os.pathsep.join(map(str, (BRIDGE, ROOT, ROOT / "tests")))
        done = subprocess.run(
            [*launcher, *([] if launcher else [sys.executable]), *map(str, args)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=1000,
        )
        assert (done.returncode != 0) == expect_failure, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr if expect_failure else done.stdout

    return run


@pytest.fixture(scope="session")
def checks_folder(tmp_path_factory):
    """Where the process of `checks` works."""
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="session")
def checks(run_bridge, checks_folder):
    """What one process found of bad input and of safety (tests/support/bridge_checks.py)."""
    run_bridge("-m", "support.bridge_checks", "all", checks_folder)
    return json.loads((checks_folder / "all.json").read_text())
