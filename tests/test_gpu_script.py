"""benchmarks/gpu.sh, rehearsed without a GPU: every step runs, and what fails is said and ends nothing else."""

from __future__ import annotations

import csv
import io
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.device import BROUGHT, DeviceMachine, make_machine, write_tool
from support.gpu_script import GPU, Left, run_driver, start_driver

from emo_megatron import ops

ROOT = Path(__file__).resolve().parents[1]
REHEARSED = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("A", "B", "C standard")]
"""Stages, with their models."""
pytestmark = pytest.mark.skipif(bool(ops.why_not_native("cpu")), reason="the compiled ops are not built")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> DeviceMachine:
    pytest.importorskip("megatron.core")
    return make_machine(tmp_path_factory.mktemp("machine"), python=sys.executable)


@pytest.mark.parametrize("stage", REHEARSED)
def test_every_step_runs_on_a_bare_image_with_four_wheels(
    machine: DeviceMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import steps

    output = tmp_path / "output"
    # short: sockets of training processes lie below
    scratch = Path(tempfile.mkdtemp())
    command = ["bash", "benchmarks/gpu.sh", *stage.split(), "--rehearse", "--output", str(output)]
    done = subprocess.run(
        [*command, "--wheels", str(machine.wheels), "--commit", "abc123"],
        cwd=ROOT,
        env=machine.environment | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    left = Left(status=done.returncode, out=done.stdout, error=done.stderr, output=output)
    names = [step.name for step in steps.STAGES[stage[0]]]
    assert {name: left.rows[name] for name in names if left.rows[name][0] != "ok"} == {}
    assert (list(left.rows), left.status) == (names, 0)
    assert sorted(path.name for path in output.iterdir()) == ["results.tgz", "summary.md"]
    assert "commit: abc123" in (output / "summary.md").read_text()
    scratch.rmdir()  # nothing is left there
    # a line each, when it ended
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[:-1]] == names
    for name in names:
        assert f"## {name}\n" in (output / "summary.md").read_text()
    if stage == "A":
        _look_at_stage_a(left.archive)


def _look_at_stage_a(archive: dict[str, bytes]) -> None:
    by_name = {name.partition("/")[2]: text.decode() for name, text in archive.items()}
    rows = list(csv.DictReader(io.StringIO(by_name["kernels.csv"])))
    kernels = {"document_scores", "select_pool", "pool_topk", "pool_topk backward"}
    assert kernels | {"copy_rows", "sum_rows"} <= {row["kernel"] for row in rows}
    for row in rows:
        times_floor = float(row["median_us"]) / float(row["floor_us"])
        assert float(row["times_floor"]) == pytest.approx(times_floor, rel=0.05, abs=0.02)
        assert "CPU" in row["how"]
    compared = by_name["builds.md"].splitlines()[2]
    assert "brought" in compared
    assert "default" in compared
    # built meanwhile for this GPU, and ptxas is asked for registers
    assert "-Xptxas -v" in by_name["default.txt"]
    assert "code=sm_90" in by_name["default.txt"]
    (page,) = (name for name in by_name if name.startswith("routing-") and name.endswith(".md"))
    assert "commit: abc123" in by_name[page]
    packages = by_name["packages.txt"].split()
    assert "torch" in packages
    assert "mypy" not in packages


def test_budgets_of_a_stage_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import steps

    assert not steps.over_budget()
    for stage in steps.STAGES.values():
        assert sum(step.seconds for step in stage) + steps.BUNDLE_SECONDS <= 540
        assert len({step.slug for step in stage}) == len(stage)
    longer = (*steps.STAGE_A, steps.STAGE_A[3])
    monkeypatch.setitem(steps.STAGES, "A", longer)
    assert steps.over_budget() == ["A"]


FAILURES = """
steps.STAGES["B"] = (
    python("fails", "print('wrong'); raise SystemExit(1)"),
    python("hangs", "import time; print('begun', flush=True); time.sleep(60)", seconds=1),
    python("compiles", "import time; time.sleep(2)", seconds=1, most_seconds=20),
    python("lacks wheels", "", needs=("wheels",)),
    python("lacks a tool", "", needs=("no-such-tool",)),
    Step(name="is no command", command=("/no/such/command",), seconds=5),
    python("runs", "import os; print(os.environ['EMO_COMMIT'], os.environ['NCCL_SOCKET_IFNAME'])"),
)
"""


def test_a_failure_is_a_row_and_the_rest_runs(machine: DeviceMachine, tmp_path: Path) -> None:
    left = run_driver(machine, tmp_path / "output", FAILURES, EMO_COMMIT="def456")
    assert left.status == 1
    found = {name: status for name, (status, _) in left.rows.items()}
    assert found == {
        "fails": "FAILED",
        "hangs": "timed out",
        # nothing works without it
        "compiles": "ok",
        "lacks wheels": "not run",
        "lacks a tool": "not run",
        "is no command": "FAILED",
        "runs": "ok",
    }
    says = {name: text for name, (_, text) in left.rows.items()}
    assert "wrong" in says["fails"]
    assert "begun" in says["hangs"]
    assert all(name in says["lacks wheels"] for name in BROUGHT)
    assert says["runs"] == "def456 lo"
    assert left.archive["01-fails.log"] == b"wrong\n"


def test_what_does_not_fit_the_budget_is_not_run(machine: DeviceMachine, tmp_path: Path) -> None:
    table = """
steps.STAGES["B"] = (
    python("first", "", seconds=20), python("long", "", seconds=200), python("short", "", seconds=5),
    python("rest", "import sys; print(sys.argv[1])", seconds=10, is_elastic=True, on_gpu=("{seconds}",)),
)
"""
    left = run_driver(machine, tmp_path / "output", table, "B", "--budget", "60")
    assert left.status == 0
    assert [status for status, _ in left.rows.values()] == ["ok", "not run", "ok", "ok"]
    assert "needs 200 s" in left.rows["long"][1]
    assert 10 < int(left.rows["rest"][1]) < 40


def test_a_given_corpus_is_passed_on(machine: DeviceMachine, tmp_path: Path) -> None:
    table = """
steps.STAGES["C"] = (
    python("reads", "import sys; print(sys.argv[1:])", with_corpus=("--corpus", "{corpus}")),
    python("reads no text", "import sys; print(sys.argv[1:])"),
)
"""
    corpus = tmp_path / "corpus.tar.xz"
    corpus.write_bytes(lzma.compress(b""))
    left = run_driver(machine, tmp_path / "given", table, "C", "emo", "--corpus", str(corpus))
    assert left.rows["reads"] == ("ok", str(["--corpus", str(corpus)]))
    assert left.rows["reads no text"] == ("ok", "[]")
    left = run_driver(machine, tmp_path / "default", table, "C", "emo")
    assert left.rows["reads"] == ("ok", "[]")


LARGE = """
write = "import os, sys; open(sys.argv[1] + '/' + sys.argv[2], 'wb').write(os.urandom(int(sys.argv[3])))"
steps.STAGES["B"] = (
    python("large", write, on_gpu=("{output}", "large.bin", "400000")),
    python("larger", write, on_gpu=("{output}", "larger.bin", "500000")),
    python("small", "print('small')"),
)
"""


@pytest.mark.parametrize(("mib", "kept"), [("0.7", ["large"]), ("0.2", [])])
def test_the_largest_files_go_to_keep_within_the_limit(
    machine: DeviceMachine, tmp_path: Path, mib: str, kept: list[str]
) -> None:
    left = run_driver(machine, tmp_path / "output", LARGE, "B", "--max-mib", mib)
    assert left.status == 0
    found = [name for name in ("large", "larger") if any(f"/{name}.bin" in key for key in left.archive)]
    assert found == kept
    assert left.archive["03-small.log"] == b"small\n"
    summary = (left.output / "summary.md").read_text()
    for name in ("large", "larger"):
        assert (f"/{name}.bin (" in summary) == (name not in kept)
    size = sum(path.stat().st_size for path in left.output.iterdir())
    assert size <= float(mib) * (1 << 20)


KILLED = """
steps.STAGES["B"] = (
    python("first", "print('done')"),
    python("second", \"\"\"import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(300)\"\"\", seconds=100, on_gpu=({pid!r},)),
    python("third", ""),
)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_its_bundle(machine: DeviceMachine, tmp_path: Path, number: signal.Signals) -> None:
    pid, output = tmp_path / "pid", tmp_path / "output"
    process = start_driver(machine, KILLED.format(pid=str(pid)), "B", "--output", str(output))
    _wait_for(lambda: pid.exists() and pid.read_text())
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    left = Left(status=process.returncode, out=out, error=error, output=output)
    child = int(pid.read_text())
    try:
        assert sorted(path.name for path in output.iterdir()) == ["results.tgz", "summary.md"]
        assert left.rows["first"] == ("ok", "done")
        assert left.archive["01-first.log"] == b"done\n"
        if number == signal.SIGKILL:
            assert left.status == -number
            assert list(left.rows) == ["first"]
            return
        assert left.status == 128 + number
        assert [status for status, _ in left.rows.values()] == ["ok", "FAILED", "not run"]
        assert number.name in left.rows["second"][1]
        assert str(child) in left.archive["02-second.log"].decode()
        assert f"## second\n\n```text\n{child}\n" in (output / "summary.md").read_text()
        _wait_for(lambda: not _runs(child))
    finally:
        if _runs(child):
            os.kill(child, signal.SIGKILL)


def _wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


NO_NVCC = 'machine.LIBRARY = machine.ROOT / "missing.so"\nmachine.tool_path = lambda: "/usr/bin"'
SMALLEST = 'steps.STAGES["B"] = (python("one", "", seconds=25), python("two", "", seconds=30))'
BAD_TABLE = 'steps.STAGES["B"] += steps.STAGES["A"]'


@pytest.mark.parametrize(
    ("arguments", "table", "says"),
    [
        (["B", "--budget", "30"], SMALLEST, ["--budget 30"]),
        (["B", "--budget", "nan"], "", ["nan"]),
        (["D"], "", ["D"]),
        (["C"], "", ["standard, emo, small"]),
        (["A", "emo"], "", ["standard, emo, small"]),
        (["B", "--max-files", "0"], "", ["--max-files"]),
        (["B", "--max-mib", "0"], "", ["--max-mib"]),
        (["B", "--partners", "/no/such/folder"], "", ["--partners /no/such/folder"]),
        (["B", "--corpus", "/etc"], "", ["--corpus", "stage C"]),
        (["C", "emo", "--corpus", "/no/such/file"], "", ["--corpus /no/such/file"]),
        (["C", "emo", "--corpus", __file__], "", ["--corpus", "packed by python -m demo.packages"]),
        (["B", "--wheels", "/no/such/folder"], "", ["--wheels /no/such/folder"]),
        (["B"], NO_NVCC, ["nvcc", "missing.so"]),
        (["B"], BAD_TABLE, ["stage B", "540"]),
    ],
)
def test_bad_input_is_one_line(
    machine: DeviceMachine, tmp_path: Path, arguments: list[str], table: str, says: list[str]
) -> None:
    _refused(run_driver(machine, tmp_path / "output", table, *arguments or ["--rehearse"]), says)
    assert not (tmp_path / "output").exists()


def _refused(left: Left, says: list[str]) -> None:
    assert left.status == 2
    assert left.out == ""
    (line,) = left.error.splitlines()
    assert line.startswith("error: ")
    assert [text for text in says if text not in line] == []


@pytest.mark.parametrize("smi", [None, "exit 0", "echo No devices were found; exit 6"])
def test_without_a_gpu_nothing_begins(machine: DeviceMachine, tmp_path: Path, smi: str | None) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    if smi:
        write_tool(tools / "nvidia-smi", smi)
    left = run_driver(machine, tmp_path / "output", "", PATH=f"{tools}:/usr/bin:/bin")
    if smi is None and shutil.which("nvidia-smi", path="/usr/bin:/bin"):
        pytest.skip("this machine has a GPU")
    _refused(left, ["GPU", "--rehearse"])
    assert not (tmp_path / "output").exists()


def test_wheels_that_are_missing_or_broken_are_named(machine: DeviceMachine, tmp_path: Path) -> None:
    wheels, output = tmp_path / "wheels", tmp_path / "output"
    shutil.copytree(machine.wheels, wheels)
    next(wheels.glob("typeguard*")).unlink()
    next(wheels.glob("docstring_parser*")).unlink()
    left = run_driver(machine, output, "", "B", "--wheels", str(wheels))
    _refused(left, ["lacks typeguard, docstring-parser,"])
    shutil.rmtree(wheels)
    shutil.copytree(machine.wheels, wheels)
    broken = next(wheels.glob("tyro*"))
    broken.write_bytes(b"half of")
    _refused(run_driver(machine, output, "", "B", "--wheels", str(wheels)), [broken.name])
    assert not output.exists()
    # a Python that has them needs none
    empty = tmp_path / "empty"
    empty.mkdir()
    plain = {"PYTHONPATH": str(ROOT)}
    table = 'steps.STAGES["B"] = (python("runs", "", needs=("wheels",)),)'
    assert run_driver(machine, output, table, "B", "--wheels", str(empty), **plain).status == 0


def test_an_output_folder_must_be_new_and_open_to_writing(machine: DeviceMachine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    _refused(run_driver(machine, tmp_path, ""), ["not an empty folder", str(tmp_path)])
    _refused(run_driver(machine, file, ""), [str(file)])
    _refused(run_driver(machine, file / "output", ""), ["cannot be written", str(file)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "mine"


def test_the_script_wants_a_python_with_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "A", "--output", str(tmp_path / "output")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    _refused(Left(status=done.returncode, out=done.stdout, error=done.stderr, output=tmp_path), ["/bin/false", "torch"])
    assert not list(tmp_path.iterdir())
