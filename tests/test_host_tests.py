"""Megatron-LM's own tests with this package's MoE layer: what is put in place, and that they pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("host_tests.py")
CLONE = "EMO_MEGATRON_LM"
MOE_TESTS = "tests/unit_tests/transformer/moe"
# kernels of Triton, and of a matrix product that takes a minute: no layer is in them
KERNELS = "not Multihot and not router_gating"

needs_clone = pytest.mark.skipif(
    CLONE not in os.environ, reason=f"{CLONE} must name a clone of Megatron-LM, see docs/megatron.md"
)

FAKE = """
from megatron.core.models.gpt import moe_module_specs
from megatron.core.transformer.moe.moe_layer import MoELayer
from tests.test_utils.python_scripts.download_unit_tests_dataset import download_and_extract_asset

def test_layer():
    assert download_and_extract_asset(assets_dir="nowhere") is False
    assert MoELayer.__mro__[1].__name__ == "PoolMoELayer"
    assert moe_module_specs.MoELayer is MoELayer
"""

FAKE_MODEL = """
import os

class MoEModelTestContainer:
    def __del__(self):
        os._exit(3)

def test_model():
    MoEModelTestContainer()
"""

_DISPATCHER = "test_a2a_token_dispatcher.py::TestAlltoAllDispatcher::"
_ROUTER = "test_routers.py::TestTop2Router::"
_QUANTILE = "test_qb_routing.py::TestQuantileBalancingRouter::"

REFUSED = {
    f"{_DISPATCHER}test_capacity_forward_backward[False-1-1]": "moe_expert_capacity_factor",
    f"{_DISPATCHER}test_capacity_padding_forward_backward[False-1-1]": "moe_expert_capacity_factor",
    f"{_ROUTER}test_token_dropping[True-probs-2.0]": "moe_expert_capacity_factor",
    f"{_ROUTER}test_token_dropping[True-position-2.0]": "moe_expert_capacity_factor",
    f"{_QUANTILE}test_qb_beta_accumulates_in_training": "quantile_balancing",
    f"{_QUANTILE}test_qb_router_rejects_padding_mask": "quantile_balancing",
}
"""Tests that stock passes and the pool layer does not: each sets an option that mcore/unsupported.py refuses."""

# its gradient is zero and has to be more: it is in stock's rounding, and not in that of the compiled ops
ROUNDING = f"{_ROUTER}test_force_load_balancing"


def _run(clone: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(clone), "-q", *arguments],
        env=os.environ | {"EMO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def _passed(layers: str) -> set[str]:
    """The tests of one process that pass."""
    options = ("-rp", "--tb=no", "-k", KERNELS)
    ran = _run(Path(os.environ[CLONE]), "--layers", layers, *options)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(f"PASSED {MOE_TESTS}/")]
    return {line.removeprefix(f"PASSED {MOE_TESTS}/") for line in lines}


@pytest.fixture(scope="module")
def passed_by_stock():
    passed = _passed("stock")
    assert len(passed) >= 100
    return passed


@pytest.mark.parametrize(("layers", "status"), [("pool", 0), ("stock", 1)])
def test_the_pool_layer_is_in_the_hosts_tests(tmp_path, layers, status):
    tests = tmp_path / MOE_TESTS
    tests.mkdir(parents=True)
    (tests / "test_fake.py").write_text(FAKE)
    (tests / "test_token_dispatcher.py").write_text(FAKE_MODEL)
    ran = _run(tmp_path, "--layers", layers)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert ("2 passed" if status == 0 else "1 failed, 1 passed") in ran.stdout


@pytest.mark.slow
@needs_clone
@pytest.mark.parametrize("layers", ["pool", "full-pools", "dedup"])
def test_what_stock_passes_passes_but_what_is_refused(layers, passed_by_stock):
    different = set(REFUSED) | ({ROUNDING} if layers == "full-pools" else set())
    assert passed_by_stock - _passed(layers) == different


@pytest.mark.slow
@needs_clone
def test_the_tests_of_the_dispatcher_pass_in_8_processes():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8")
    tests = f"{MOE_TESTS}/test_a2a_token_dispatcher.py"
    dedup = ("--layers", "dedup", tests, "-k", "not capacity")
    ran = _run(Path(os.environ[CLONE]), *dedup, launcher=launcher)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "9 passed" in ran.stdout
