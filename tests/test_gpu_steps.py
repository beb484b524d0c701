"""The steps of benchmarks/gpu.sh see what is wrong, and judge what they measure."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.device import ROOT
from support.gpu_script import GPU

from emo_megatron import ops
from emo_megatron.ops import dispatch, native

pytestmark = pytest.mark.skipif(bool(ops.why_not_native("cpu")), reason="the compiled ops are not built")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The steps' modules can be imported, and are on a CPU."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.setattr(sys, "argv", ["step", "--device", "cpu"])
    return monkeypatch


def test_smoke_has_every_public_op(scripts: pytest.MonkeyPatch) -> None:
    import smoke

    asks = {"available_backends", "best_backend", "why_not_native"}
    public = [name for module in (ops, dispatch) for name in module.__all__ if name.islower() and name not in asks]
    assert set(public) == set(smoke.OPERATORS)


def _rolled(routing: ops.Routing) -> ops.Routing:
    return replace(routing, routing_map_TE=routing.routing_map_TE.roll(1, dims=1))


def test_smoke_tells_a_wrong_op_and_goes_on(scripts: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import smoke

    real = smoke.route
    scripts.setattr(sys, "argv", ["smoke", "--device", "cpu", "--tokens", "256"])
    assert smoke.main() == 0
    scripts.setattr(smoke, "route", lambda *arguments: _rolled(real(*arguments)))
    assert smoke.main() == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = {line.split(",")[0] for line in lines if "other experts" in line}
    assert wrong == {"pool_topk"}
    plan = dispatch.plan_send(torch.eye(4, dtype=torch.bool), num_ranks=2, num_rows=4, num_pairs=4)
    moved = replace(plan, rows=plan.rows._replace(bounds_N=plan.rows.bounds_N + 1))
    assert smoke._unequal(plan, plan) == ""
    assert "bounds_N" in smoke._unequal(moved, plan)
    scripts.setattr(smoke, "scores_of", lambda *_: 1 / 0)
    assert smoke.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any("ZeroDivisionError" in line for line in lines)
    assert any(line.startswith("sum_rows") for line in lines)


@pytest.mark.parametrize("check", ["first-capture", "other-stream", "equal-bits", "decisions"])
def test_checks_see_a_route_that_changes(scripts: pytest.MonkeyPatch, check: str) -> None:
    import checks

    scripts.setattr(sys, "argv", ["checks", check, "--device", "cpu", "--tokens", "256"])
    assert checks.main() == 0
    real, calls = checks.route, iter(range(1000))

    def changing(*arguments: object) -> ops.Routing:
        routing = real(*arguments)
        return _rolled(routing) if next(calls) % 2 else routing

    scripts.setattr(checks, "route", changing)
    assert checks.main() == 1


def test_a_check_that_fails_leaves_the_others_their_turn(
    scripts: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import checks

    def broken(_: object) -> str:
        raise RuntimeError("out of memory")

    scripts.setattr(sys, "argv", ["checks", "decisions", "equal-bits", "--device", "cpu", "--tokens", "256"])
    scripts.setitem(checks.CHECKS, "decisions", broken)
    assert checks.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("decisions: RuntimeError") for line in lines)
    assert any(line.startswith("equal-bits: 20 runs") for line in lines)
    assert lines[-1].endswith("wrong: decisions")


def test_sanitized_cases_are_compared_with_the_cpu(scripts: pytest.MonkeyPatch) -> None:
    import sanitize

    assert sanitize.main() == 0
    real, calls = sanitize.dispatch.sum_rows, iter(range(10000))

    def changing(copies_PH: torch.Tensor, **options: object) -> torch.Tensor:
        return real(copies_PH, **options) + next(calls)

    scripts.setattr(sanitize.dispatch, "sum_rows", changing)
    assert sanitize.main() == 1


@pytest.fixture
def package(scripts: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], tuple[Path, list[list[str]]]]:
    """Gives the package a library that does not work, for a reason; what is compiled is a file, which then works."""

    def prepare(reason: str) -> tuple[Path, list[list[str]]]:
        import builds

        library, compiled = tmp_path / "_native.so", []
        library.write_text("for CPUs")

        def make(folder: Path, *, logs: Path, variants: list[str]) -> None:
            compiled.append(variants)
            folder.mkdir(exist_ok=True)
            (folder / "default.so").write_text("for this GPU")

        scripts.setattr(native, "LIBRARY", library)
        scripts.setattr(ops, "why_not_native", lambda _: reason)
        scripts.setattr(builds, "make", make)
        # the new process that looks again
        scripts.setattr(builds.subprocess, "run", lambda *_, **__: None)
        return library, compiled

    return prepare


def test_a_library_that_does_not_work_is_compiled_even_if_one_was_brought(
    package: Callable[[str], tuple[Path, list[list[str]]]], tmp_path: Path
) -> None:
    library, compiled = package("built without kernels for cuda")
    import builds

    builds.wait(tmp_path / "builds", logs=tmp_path, device="cuda")
    assert compiled == [["default"]]
    assert library.read_text() == "for this GPU"

    library, compiled = package("")
    builds.wait(tmp_path / "builds", logs=tmp_path, device="cuda")
    assert compiled == []
    assert library.read_text() == "for CPUs"


def test_the_kernels_target_is_judged_on_a_gpu(scripts: pytest.MonkeyPatch) -> None:
    import kernels

    def page(factor: float, device: str) -> str:
        # a byte a second: the floor is one second a kernel
        timed = [
            kernels.Timed(
                kernel=name,
                tokens=65536,
                experts=128,
                dtype="float32",
                layout="packed",
                how="graph replay",
                seconds=[factor + random.Random(i).uniform(0, 0.01) for i in range(5)],
                num_bytes=1,
            )
            for name in kernels.ROUTING
        ]
        return kernels.page_of(timed, 1.0, torch.device(device), [])

    assert "- met: " in page(1.9, "cuda")
    assert "- MISSED: " in page(2.1, "cuda")
    assert "- not measured: " in page(1.9, "cpu")
    assert "- not judged: " in kernels.page_of([], 1.0, torch.device("cuda"), [])
