"""csrc/ compiled for tests: the CUDA kernels for the host, around cuda_emulator.h, or the CPU kernels of a copy."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from emo_megatron.ops.native import NativeOps, load_native

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator.h")
CSRC_VARIABLE = "EMO_TEST_CSRC"
"""Environment variable: compile the kernels in this folder instead of csrc/."""

Kernels = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Compiled:
    """One compiled implementation (or the reference), and where its tensors live."""

    ops: Any
    device: torch.device

    @property
    def is_checked(self) -> bool:
        """Whether it can look at ids and indices: on a GPU that would mean waiting."""
        return self.device.type == "cpu" and self.ops is not _loaded.get("cuda")


_loaded: dict[Kernels, NativeOps] = {}


def load_compiled(kernels: Kernels) -> NativeOps:
    """The CUDA kernels run lane by lane on the CPU, or the CPU kernels; compiled once for each state of the sources."""
    if kernels not in _loaded:
        csrc = Path(os.environ.get(CSRC_VARIABLE, ROOT / "csrc"))
        digest = hashlib.sha256(torch.__version__.encode())
        for path in [*sorted(csrc.iterdir()), EMULATOR]:
            digest.update(path.read_bytes())
        folder = csrc.parent / "build" / f"test-{kernels}"
        target = folder / f"{digest.hexdigest()[:16]}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for older in folder.glob("*.so"):
                older.unlink(missing_ok=True)
            # several test processes may build at once: each for itself, the last one's stays
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _build(csrc, kernels, Path(scratch) / target.name).replace(target)
        _loaded[kernels] = NativeOps(target, namespace=namespace_of(kernels))
    return _loaded[kernels]


def host_ops() -> NativeOps:
    """The package's own CPU kernels, or those of the sources under test."""
    return load_compiled("cpu") if CSRC_VARIABLE in os.environ else load_native()


def namespace_of(kernels: Kernels) -> str:
    """Where torch registers them, beside the package's own operators."""
    return f"emo_megatron_test_{kernels}"


def setup_module() -> Any:
    """setup.py, for the flags it compiles with."""
    spec = importlib.util.spec_from_file_location("emo_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(csrc: Path, kernels: Kernels, target: Path) -> Path:
    setup = setup_module()
    torch_dir = Path(torch.__file__).parent
    # few warps, so that also few tokens make each of them take several
    emulated = ["-O1", "-Wno-attributes", "-DEMO_EMULATE", "-DEMO_WARPS_WANTED=16"]
    common = [
        *(os.environ.get("CXX", "c++"), *setup.CPP, *setup.CPU_KERNELS),
        *(emulated if kernels == "cuda" else ["-DEMO_CLONES="]),
        *(f"-DEMO_NAMESPACE={namespace_of(kernels)}", f"-DTORCH_TARGET_VERSION={setup.STABLE_ABI}"),
        *(f"-I{EMULATOR.parent}", f"-I{csrc}"),
        *(f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"),
    ]
    wanted = setup.CUDA_SOURCES if kernels == "cuda" else setup.CPU_SOURCES
    sources = [csrc / Path(source).name for source in (*wanted, *setup.BINDINGS)]
    objects = [target.with_suffix(f".{source.name}.o") for source in sources]
    jobs = [
        [*common, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, jobs))
    libraries = [f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu"]
    _run([common[0], "-shared", *map(str, objects), "-o", str(target), *libraries])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
