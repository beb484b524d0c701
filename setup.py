"""The compiled ops in csrc/; everything else about the package is in pyproject.toml.

One library against torch's stable ABI: it loads on every torch from 2.11 on and in every Python 3, and its CUDA kernels
run where torch has CUDA. Environment variables:

    EMO_CUDA        auto (default): CUDA kernels where nvcc is found; 0: none; 1: fail without nvcc
    EMO_CUDA_ARCHS  compute capabilities, default 80;90;100; the last one also as PTX for later GPUs

Neither torch nor a GPU is imported or asked here, so images and wheels are built anywhere. A machine that cannot
compile still installs: one line says that the reference ops will run.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

STABLE_ABI = "0x020b000000000000"  # torch 2.11
CPP = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# every operation rounds once and in order: the same bits on every CPU
CPU_KERNELS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

CPU_SOURCE = "csrc/pool_ops_cpu.cpp"
CUDA_SOURCE = "csrc/pool_ops.cu"
BINDING = "csrc/binding.cpp"
HEADERS = ["csrc/pool_ops.h", "csrc/vectors.h", "csrc/warp.cuh"]


def find_torch() -> Path:
    """The folder of the installed torch, also from inside pip's isolated build environment."""
    found = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    folders.append(Path(sysconfig.get_path("purelib")) / "torch")
    for folder in folders:
        if (folder / "include").is_dir():
            return folder
    raise PlatformError("torch is not installed: install it first, then emo_megatron")


def find_nvcc() -> str | None:
    """The CUDA compiler to use, None for a build without CUDA kernels."""
    wish = os.environ.get("EMO_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"error: EMO_CUDA must be auto, 0 or 1; got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and wish == "1":
        raise SystemExit("error: EMO_CUDA=1 and there is no nvcc on the PATH or in CUDA_HOME/bin")
    return nvcc


def gpu_code() -> list[str]:
    """nvcc's flags for machine code of every wanted GPU, and PTX of the last."""
    archs = os.environ.get("EMO_CUDA_ARCHS", "80;90;100").split(";")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExtensions(build_ext):
    """Compiles with the plain compilers, side by side."""

    def get_ext_filename(self, fullname: str) -> str:
        # torch loads it, Python does not import it: no Python version in the name
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError, subprocess.CalledProcessError) as error:
            if os.environ.get("EMO_CUDA") == "1":
                raise
            self.extensions = []
            self.warn(f"no compiled ops, the reference ops will run: {error}")

    def build_extension(self, ext: Extension) -> None:
        torch, nvcc = find_torch(), find_nvcc()
        scratch, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        scratch.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        if shutil.which(cxx) is None:
            raise PlatformError(f"there is no C++ compiler {cxx!r}")
        include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
        binding = [*include, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        commands = {
            CPU_SOURCE: [cxx, *CPP, *CPU_KERNELS],
            BINDING: [cxx, *CPP, *binding, *(["-DEMO_WITH_CUDA"] if nvcc else [])],
        }
        if nvcc:
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
            commands[CUDA_SOURCE] = [nvcc, "-std=c++17", "-O3", "-t", "0", *host, *gpu_code()]
        objects = {source: str(scratch / f"{Path(source).name}.o") for source in commands}
        jobs = [[*command, "-c", s, "-o", objects[s]] for s, command in commands.items()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(subprocess.check_call, jobs))
        # libtorch must be named even if nothing of it is missing: the CUDA stream getter is a weak symbol of it
        needed = ["-Wl,--no-as-needed", f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"]
        if nvcc:
            needed[0] = "-Xlinker=--no-as-needed"
        linker = [nvcc, "-shared", "-cudart", "static"] if nvcc else [cxx, "-shared"]
        part = target.with_suffix(".part")
        subprocess.check_call([*linker, *objects.values(), "-o", str(part), *needed])
        part.replace(target)


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3 of this platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("emo_megatron._native", [CPU_SOURCE, CUDA_SOURCE, BINDING], depends=HEADERS)
        ],
        cmdclass={"build_ext": BuildExtensions, "bdist_wheel": Wheel},
    )
