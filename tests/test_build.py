"""Building csrc/: one wheel for every Python and torch, honest without compilers, kernels that fit into registers."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import emo_megatron

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "emo_megatron", "pyproject.toml", "setup.py", "README.md", "LICENSE")
ARCHS = (80, 90, 100)
KERNELS = {
    "document_scores_kernel",
    "select_pool_kernel",
    "pool_topk_kernel",
    "finish_kernel",
    "pool_topk_backward_kernel",
}
NVCC = shutil.which("nvcc")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
ARM_EMULATOR = shutil.which("qemu-aarch64")


def build_wheel(folder: Path, *, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a copy of the project into `folder`, with PATH `path`."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    (source / "emo_megatron" / "_native.so").unlink(missing_ok=True)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(folder), str(source)),
        ],
        env={"PATH": path, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def wheel_in(folder: Path) -> Path:
    (wheel,) = folder.glob(f"emo_megatron-{emo_megatron.__version__}-*.whl")
    return wheel


def test_the_wheel_serves_every_python_and_loads_without_its_sources(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, path="/usr/local/bin:/usr/bin:/bin", EMO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel_in(tmp_path).name)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel_in(tmp_path)) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith(("csrc", "tests"))]
        wheel.extractall(installed)
    program = (
        "import torch; from emo_megatron import ops; print(ops.available_backends()['native'], "
        "ops.pool_topk(torch.zeros(2, 4), top_k=2, backend='native').routing_map_TE.tolist(), ops.__file__)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.startswith(" [[True, True, False, False]")
    assert str(installed) in told


def test_a_machine_without_a_compiler_builds_a_wheel(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no compiled ops, the reference ops will run: there is no C++ compiler" in (
        done.stdout + done.stderr
    )
    with zipfile.ZipFile(wheel_in(tmp_path)) as wheel:
        assert "emo_megatron/_native.so" not in wheel.namelist()


@pytest.mark.parametrize(
    ("wish", "message"),
    [("1", "EMO_CUDA=1 and there is no nvcc"), ("yes", "EMO_CUDA must be auto, 0 or 1; got 'yes'")],
)
def test_a_wish_that_cannot_be_met_fails(tmp_path: Path, wish: str, message: str) -> None:
    done = build_wheel(tmp_path, path="/usr/bin:/bin", EMO_CUDA=wish, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_compile_for_every_gpu_and_none_spills(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    assert NVCC is not None

    def compile_for(arch: int) -> str:
        command = [
            *(NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin"),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *("-o", str(tmp_path / f"{arch}.cubin"), str(ROOT / "csrc" / "pool_ops.cu")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(ARCHS, pool.map(compile_for, ARCHS), strict=True))
    for arch, report in reports.items():
        found = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers",
            report,
            re.DOTALL,
        )
        assert {kernel for kernel in KERNELS for name, *_ in found if kernel in name} == KERNELS
        assert [name for name, stores, loads, _ in found if stores != "0" or loads != "0"] == []
        record_property(f"most registers, sm_{arch}", max(int(used) for *_, used in found))


def kernel_bits(folder: Path, compiler: str, *flags: str, run_with: tuple[str, ...] = ()) -> str:
    """Hashes of what the CPU kernels compute, built by this compiler."""
    program = folder / f"bits{len(list(folder.iterdir()))}"
    sources = [ROOT / "tests/support/kernel_bits.cpp", ROOT / "csrc/pool_ops_cpu.cpp"]
    exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    command = [compiler, "-std=c++17", "-O3", "-Wall", "-Werror", "-Wno-psabi", *exact, *flags]
    subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)], check=True
    )
    done = subprocess.run([*run_with, str(program)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_cpu_kernels_give_the_same_bits_for_every_register_width(tmp_path: Path) -> None:
    as_shipped = kernel_bits(tmp_path, "c++")
    assert len(as_shipped.splitlines()) == 4 * (2 + 3 * 7)
    flags = Path("/proc/cpuinfo").read_text()
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
    for level, needed in levels.items():
        if needed in flags:
            assert kernel_bits(tmp_path, "c++", f"-march={level}", "-DEMO_CLONES=") == as_shipped


@pytest.mark.slow
@pytest.mark.skipif(ARM_COMPILER is None, reason="no aarch64-linux-gnu-g++")
def test_cpu_kernels_compile_for_arm_and_give_the_same_bits(tmp_path: Path) -> None:
    assert ARM_COMPILER is not None
    run_with = (ARM_EMULATOR,) if ARM_EMULATOR else ("true",)
    on_arm = kernel_bits(tmp_path, ARM_COMPILER, "-static", run_with=run_with)
    if ARM_EMULATOR:
        assert on_arm == kernel_bits(tmp_path, "c++")
