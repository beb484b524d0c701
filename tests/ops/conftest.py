"""The compiled ops under test, on the CPU, emulated and on a GPU, and memory that shows what they leave unwritten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.emulator import Compiled, host_ops, load_compiled

from emo_megatron.ops import reference

COMPILED = ("cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="session", params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """CPU kernels, CUDA kernels run lane by lane on the CPU, and CUDA kernels."""
    return _implementation(request.param)


@pytest.fixture(scope="session", params=("reference", *COMPILED))
def implementation(request: pytest.FixtureRequest) -> Compiled:
    """The same and the reference."""
    return _implementation(request.param)


def _implementation(name: str) -> Compiled:
    if name in ("reference", "emulated"):
        return Compiled(reference if name == "reference" else load_compiled("cuda"), torch.device("cpu"))
    return Compiled(host_ops(), torch.device(name))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Outputs hold NaN (floats), the largest integer or True until a kernel writes them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
