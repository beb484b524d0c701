"""Building csrc/: one wheel for every Python and torch, honest without compilers, kernels that fit into registers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.emulator import setup_module

import emo_megatron

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "emo_megatron", "pyproject.toml", "setup.py", "README.md", "LICENSE")
SETUP = setup_module()
KERNELS = {
    "document_scores_kernel",
    "select_pool_kernel",
    "pool_topk_kernel",
    "finish_kernel",
    "pool_topk_backward_kernel",
    *("count_sends_kernel", "send_kernel", "receive_kernel", "scan_kernel", "offsets_kernel"),
    *("copy_rows_kernel", "sum_rows_kernel"),
    *("experts_used_kernel", "document_statistics_kernel", "draw_bits_kernel"),
}
NVCC = shutil.which("nvcc")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
ARM_EMULATOR = shutil.which("qemu-aarch64")


def copy_sources(folder: Path) -> None:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)


def build_wheel(folder: Path, *, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a copy of the project into `folder`, with PATH `path`."""
    source = folder / "source"
    source.mkdir()
    copy_sources(source)
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


@pytest.mark.slow
def test_the_wheel_serves_every_python_and_loads_without_its_sources(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, path="/usr/local/bin:/usr/bin:/bin", EMO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel_in(tmp_path).name)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel_in(tmp_path)) as wheel:
        assert not [name for name in wheel.namelist() if name.startswith(("csrc", "tests"))]
        wheel.extractall(installed)
    program = (
        "import torch; from emo_megatron import ops; print(ops.available_backends()['native (cpu)'], "
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
    done = build_wheel(tmp_path, path=str(tmp_path), EMO_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no compiled ops" in (done.stdout + done.stderr)
    with zipfile.ZipFile(wheel_in(tmp_path)) as wheel:
        assert "emo_megatron/_native.so" not in wheel.namelist()


def fake_tool(folder: Path, name: str, script: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.slow
def test_an_nvcc_that_fails_costs_the_gpu_kernels_only(tmp_path: Path) -> None:
    fake_tool(tmp_path, "nvcc", 'case "$*" in --list*) echo compute_80;; *) exit 7;; esac')
    path = f"{tmp_path}/bin:/usr/local/bin:/usr/bin:/bin"
    done = build_wheel(tmp_path, path=path, CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA kernels: " in done.stdout + done.stderr
    with zipfile.ZipFile(wheel_in(tmp_path)) as wheel:
        assert "emo_megatron/_native.so" in wheel.namelist()


def test_a_wish_that_cannot_be_met_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_CUDA", "yes")
    with pytest.raises(SystemExit, match="EMO_CUDA"):
        SETUP.find_nvcc()


def test_a_failed_build_leaves_no_older_library(tmp_path: Path) -> None:
    copy_sources(tmp_path)
    library = tmp_path / "emo_megatron" / "_native.so"
    library.write_text("older")
    fake_tool(tmp_path, "c++", "exit 3")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for wish, status in (("auto", 0), ("1", 1)):
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "EMO_CUDA": "0", "EMO_BUILD": wish}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert not library.exists()


def test_torch_is_found_from_an_isolated_build(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SETUP.find_torch()
    monkeypatch.setattr(SETUP.importlib.util, "find_spec", lambda name: None)
    assert SETUP.find_torch() == found


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.slow
def test_kernels_compile_for_every_gpu_and_none_spills(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    assert NVCC is not None

    def compile_for(arch: str, source: str) -> str:
        command = [
            *(NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin"),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *("-o", str(tmp_path / f"{arch}{Path(source).stem}.cubin"), str(ROOT / source)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    cases = [(arch, source) for source in reversed(SETUP.CUDA_SOURCES) for arch in SETUP.ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        told = list(pool.map(lambda case: compile_for(*case), cases))
    for arch in SETUP.ARCHS:
        report = "".join(text for (a, _), text in zip(cases, told, strict=True) if a == arch)
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
    sources = [ROOT / name for name in ("tests/support/kernel_bits.cpp", *SETUP.CPU_SOURCES)]
    command = [compiler, *SETUP.CPP, *SETUP.CPU_KERNELS, "-Wall", "-Werror", *flags]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([*run_with, str(program)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_cpu_kernels_give_the_same_bits_for_every_register_width(tmp_path: Path) -> None:
    as_shipped = kernel_bits(tmp_path, "c++")
    assert len(as_shipped.splitlines()) == 4 * (2 + 2 + 4 * 8) + 2 * 4 * 2 + 4
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
