"""Megatron-LM's own tests with this package's MoE layer: what is put in place, and that they pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("host_tests.py")
CLONE = "EMO_MEGATRON_LM"

FAKE = """
from megatron.core.models.gpt import moe_module_specs
from megatron.core.transformer.moe.moe_layer import MoELayer
from tests.test_utils.python_scripts.download_unit_tests_dataset import download_and_extract_asset

def test_layer():
    assert download_and_extract_asset(assets_dir="nowhere") is False
    assert MoELayer.__mro__[1].__name__ == "PoolMoELayer"
    assert moe_module_specs.MoELayer is MoELayer
"""


def _run(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(clone), "-q", *arguments],
        env=os.environ | {"EMO_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("layers", "status"), [("pool", 0), ("stock", 1)])
def test_the_pool_layer_is_in_the_hosts_tests(tmp_path, layers, status):
    tests = tmp_path / "tests/unit_tests/transformer/moe"
    tests.mkdir(parents=True)
    (tests / "test_fake.py").write_text(FAKE)
    ran = _run(tmp_path, "--layers", layers)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert ("1 passed" if status == 0 else "1 failed") in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(CLONE not in os.environ, reason=f"{CLONE} names no clone of Megatron-LM")
@pytest.mark.parametrize("layers", ["pool", "full-pools", "dedup"])
def test_megatrons_tests_of_the_dispatcher_pass(layers):
    one_process = "1-1] and not capacity"
    tests = "tests/unit_tests/transformer/moe/test_a2a_token_dispatcher.py"
    ran = _run(Path(os.environ[CLONE]), "--layers", layers, tests, "-k", one_process)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
