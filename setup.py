"""Build of the compiled ops in csrc/; all other settings of the package are in pyproject.toml.

The build makes one library for torch's stable ABI. The library loads in every torch from 2.11 on and every Python 3.
The CUDA kernels run if torch has CUDA. Environment variables:

    EMO_BUILD       auto (default): compile; if that fails, install without compiled ops, and plain PyTorch runs.
                    0: do not compile. 1: compile, or fail.
    EMO_CUDA        auto (default): CUDA kernels if nvcc is found. 0: no CUDA kernels. 1: CUDA kernels, or fail.
    EMO_CUDA_ARCHS  compute capabilities, 80 or above. Default: those of 80;90;100 that nvcc supports. The last one is
                    also compiled to PTX, for later GPUs.

torch must be installed first. The build neither imports torch nor needs a GPU, so any machine can build images and
wheels.
"""

import importlib.util
import os
import shutil
import site
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

STABLE_ABI = "0x020b000000000000"  # torch 2.11
ARCHS = ("80", "90", "100")
CPP = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# every operation rounds once, in program order, so results have equal bits on all CPUs
CPU_KERNELS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

CPU_SOURCES = [
    *("csrc/scores_cpu.cpp", "csrc/groups_cpu.cpp", "csrc/routing_cpu.cpp"),
    *("csrc/documents_cpu.cpp", "csrc/dispatch_cpu.cpp"),
]
CUDA_SOURCES = [*("csrc/rows.cu", "csrc/dispatch.cu", "csrc/documents.cu"), *("csrc/scores.cu", "csrc/routing.cu")]
BINDINGS = ["csrc/routing_binding.cpp", "csrc/documents_binding.cpp", "csrc/dispatch_binding.cpp"]
HEADERS = [
    *("csrc/pool_ops.h", "csrc/document_ops.h", "csrc/dispatch_ops.h", "csrc/binding.h"),
    *("csrc/vectors.h", "csrc/groups_cpu.h", "csrc/warp.cuh", "csrc/groups.cuh"),
]


def wish(name: str) -> str:
    """Value of an environment variable that must be auto, 0 or 1; auto if it is not set."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"error: {name} must be auto, 0 or 1; got {value!r}")
    return value


def find_torch() -> Path:
    """The folder of the installed torch; also works inside pip's isolated build environment."""
    found = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    homes = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders += [Path(home) / "torch" for home in (*homes, site.getusersitepackages())]
    for folder in folders:
        if (folder / "include").is_dir():
            return folder
    raise PlatformError("torch must be installed before emo_megatron: install torch first")


def find_nvcc() -> str | None:
    """Path of the CUDA compiler; None: build without CUDA kernels."""
    if wish("EMO_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("PATH"), "/usr/local/cuda"]
    places = [f"{homes[0]}/bin" if homes[0] else None, homes[1], f"{homes[2]}/bin"]
    for place in filter(None, places):
        if nvcc := shutil.which("nvcc", path=place):
            return nvcc
    if wish("EMO_CUDA") == "1":
        raise SystemExit(
            "error: EMO_CUDA=1 requires nvcc in CUDA_HOME/bin, on the PATH or in /usr/local/cuda/bin; none was found"
        )
    return None


def gpu_code(nvcc: str) -> list[str]:
    """nvcc's flags for machine code per compute capability, and for PTX of the last one."""
    archs = os.environ.get("EMO_CUDA_ARCHS", "").split(";")
    if archs == [""]:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        archs = [arch for arch in ARCHS if f"compute_{arch}" in known.split()]
    if not archs:
        raise PlatformError(f"{nvcc} must support one of the compute capabilities {', '.join(ARCHS)}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def run_all(commands: list[list[str]]) -> None:
    """Run commands in parallel."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(subprocess.check_call, commands))


class BuildExtensions(build_ext):
    """Compiles by calls of the C++ and CUDA compilers, in parallel."""

    def get_ext_filename(self, fullname: str) -> str:
        # no Python version in the name, because torch loads the library and Python does not import it
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        if wish("EMO_BUILD") == "0":
            self.extensions = []
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError, subprocess.CalledProcessError) as error:
            if wish("EMO_BUILD") == "1" or wish("EMO_CUDA") == "1":
                raise
            self.extensions = []
            self.warn(f"no compiled ops; the reference ops will run: {error}")

    def build_extension(self, ext: Extension) -> None:
        # remove old libraries, so that none remains if the build fails
        targets = [Path(self.get_ext_fullpath(ext.name)), Path(self.get_ext_filename(ext.name))]
        for target in targets:
            target.unlink(missing_ok=True)
        nvcc = find_nvcc()
        try:
            self._compile(targets[0], nvcc)
        except (PlatformError, subprocess.CalledProcessError) as error:
            if nvcc is None or wish("EMO_CUDA") == "1":
                raise
            self.warn(f"no CUDA kernels: {error}")
            self._compile(targets[0], None)

    def _compile(self, target: Path, nvcc: str | None) -> None:
        torch, scratch = find_torch(), Path(self.build_temp)
        scratch.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        if shutil.which(cxx) is None:
            raise PlatformError(f"there is no C++ compiler {cxx!r}")
        include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
        abi = [*include, f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
        commands = {
            **{b: [cxx, *CPP, *abi, *(["-DEMO_WITH_CUDA"] if nvcc else [])] for b in BINDINGS},
            **{source: [cxx, *CPP, *CPU_KERNELS] for source in CPU_SOURCES},
        }
        if nvcc:
            host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
            # --threads=0 compiles all GPU targets of a file in parallel, because a single file takes longest
            gpu = [nvcc, "-std=c++17", "-O3", "--threads=0", *host, *gpu_code(nvcc)]
            # longest compile times first
            commands = dict.fromkeys(reversed(CUDA_SOURCES), gpu) | commands
        objects = {source: str(scratch / f"{Path(source).name}.o") for source in commands}
        run_all([[*command, "-c", s, "-o", objects[s]] for s, command in commands.items()])
        # link libtorch even if all symbols resolve without it: the CUDA stream getter is a weak symbol of libtorch
        linker = [nvcc, "-shared", "-cudart", "static"] if nvcc else [cxx, "-shared"]
        needed = "-Xlinker=--no-as-needed" if nvcc else "-Wl,--no-as-needed"
        libraries = [needed, f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"]
        part = target.with_suffix(".part")
        run_all([[*linker, *objects.values(), "-o", str(part), *libraries]])
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
        ext_modules=[Extension("emo_megatron._native", [*CPU_SOURCES, *CUDA_SOURCES, *BINDINGS], depends=HEADERS)],
        cmdclass={"build_ext": BuildExtensions, "bdist_wheel": Wheel},
    )
