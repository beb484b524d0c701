"""What every test gets: fixed seeds, a device, no CPU backend left on, and no GPU test on a machine without one."""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import DECISIONS, PARITY_TABLE
from support.pretraining import write_data
from support.ranks import Ranks

from emo_megatron.mcore import cpu
from emo_megatron.runners.cache import FOLDER
from emo_megatron.variables import PARENT

# what a test starts ends with this process, even if that is killed
os.environ[PARENT] = str(os.getpid())
# of fixtures that several tests share
os.environ[FOLDER] = os.devnull
# tests run side by side: with a thread per core in each they take half as much CPU time again
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

HAS_GPU = torch.cuda.is_available() and os.environ.get("EMO_DEVICE") != "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-table", help="benchmarks/results/parity.md: rewrite its table from this run's parity cases"
    )
    parser.addoption(
        "--write-serving", action="store_true", help="benchmarks/results/serve.json: write it from this run"
    )
    parser.addoption("--write-pins", action="store_true", help="tests/data/pins.json: write it from this run")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(PARITY_TABLE, None)
    if lines:
        terminalreporter.section("parity with one process")
        terminalreporter.write_line("\n".join(lines))
    counted: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        counted.update({name: value for name, value in report.user_properties if name in DECISIONS})
    if counted:
        terminalreporter.section("decisions of the compiled ops against the reference's")
        for name in DECISIONS:
            terminalreporter.write_line(f"{name}: {counted[name]}")


FIRST = (
    "test_native_mutations",
    "test_mutations",
    "test_docs",
    "test_pretrain",
    "test_tutorial",
    "test_resume",
    "test_parity",
    "test_layouts",
    "test_stats_select",
)
"""Files that take minutes: started last, one would keep all but one processor waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the order is the same in every process that runs them
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one measured, or what the user did."""
    monkeypatch.setenv(FOLDER, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_cpu_backend_here() -> Iterator[None]:
    """The CPU backend changes torch for the rest of a process; tests that need it run in processes of their own."""
    yield
    assert not cpu.is_active(), "this test left Megatron's CPU backend on in the process of all tests"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always, and a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Gives the live processes of a world size, started at its first use."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in started or not started[world_size].is_alive:
            started[world_size] = Ranks(world_size)
        return started[world_size]

    yield get
    for group in started.values():
        group.close()


@pytest.fixture(scope="session")
def data_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small indexed dataset of documents of many lengths."""
    return write_data(tmp_path_factory.mktemp("data"))
