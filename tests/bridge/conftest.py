"""Jobs beside Bridge, in processes whose path begins with the folder that `make` installs it into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BRIDGE = ROOT / ".venv" / "megatron-bridge-0.6.2"
PATH = os.pathsep.join(map(str, (BRIDGE, ROOT, ROOT / "tests")))


@pytest.fixture(scope="session")
def bridge_environment():
    """Of processes that import Bridge."""
    if not BRIDGE.is_dir():
        pytest.skip(f"needs {BRIDGE.relative_to(ROOT)}: make test installs it")
    return os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def start_bridge(bridge_environment):
    """Runs a command in a process of its own and gives its output; an error if it fails."""

    def run(*command, **variables):
        done = subprocess.run(
            [*map(str, command)], env=bridge_environment | variables, capture_output=True, text=True, timeout=1000
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_bridge(bridge_environment, tmp_path_factory):
    """The same for `-m module` or a script of this project, in a fork of one process that has imported Bridge."""
    folder = tmp_path_factory.mktemp("jobs")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-m", "support.bridge_server"], env=bridge_environment, **pipes)

    def run(*args, **variables):
        out, err = folder / "out.txt", folder / "err.txt"
        for path in (out, err):
            path.write_text("")
        job = {"args": [*map(str, args)], "environment": variables, "out": str(out), "err": str(err)}
        print(json.dumps(job), file=server.stdin, flush=True)
        code = server.stdout.readline().strip()
        assert code == "0", (code, out.read_text()[-4000:] + err.read_text()[-4000:])
        return out.read_text()

    yield run
    server.kill()
    server.communicate()
