"""How fuzzing runs, and what every input must come to: a right result, or one line that names the file or the flag."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis.strategies import SearchStrategy
from support.running import limited

SHORT, LONG = 25, 500
"""Inputs of a target in `make test` and in `make test-all`."""
SEED = int(os.environ.get("EMO_FUZZ_SEED", "0"))
"""Other inputs: EMO_FUZZ_SEED=1 make test-all ARGS="tests/fuzz"."""
SECONDS = 20
"""No input of some kilobytes may take longer."""
MEMORY = 6 * 2**30
"""Nor ask for so many more bytes."""

both_sizes = pytest.mark.parametrize(
    "inputs", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)


class TooLongError(AssertionError):
    """An input that nobody would wait for."""


def fuzz(
    inputs: int,
    drawn: SearchStrategy[Any],
    check: Callable[[Any], None],
    *,
    known: Iterable[Any] = (),
    is_whole_process: bool = False,
) -> None:
    """Check `known` inputs and then drawn ones, the same in every run of a seed; the smallest that fails is printed.

    Whole processes have limits of their own, and are too slow to look for the smallest.
    """

    def one(found: Any) -> None:
        with contextlib.nullcontext() if is_whole_process else _bounded():
            check(found)

    run = given(drawn)(one)
    for found in known:
        run = example(found)(run)
    choice = settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate) if is_whole_process else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )
    seed(SEED)(choice(run))()


def read_or_refused[T](read: Callable[[], T], *, named: Iterable[str]) -> T | None:
    """What is read, or None where it is refused as a user's error is."""
    try:
        return read()
    except (OSError, ValueError) as error:
        check_line(str(error), named=named)
    return None


def check_line(told: str, *, named: Iterable[str]) -> None:
    """One line, or one and a list of problems, that names one of these."""
    assert "\n" not in told.replace("\n  - ", ""), f"not one line: {told}"
    assert any(name in told for name in named), f"names none of {list(named)}: {told}"


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limit time and memory of what runs inside."""

    def stop(*_: object) -> None:
        raise TooLongError(f"longer than {SECONDS} s")

    with open("/proc/self/statm", encoding="ascii") as sizes:  # noqa: PTH123
        now = int(sizes.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with limited(resource.RLIMIT_AS, now + MEMORY):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
