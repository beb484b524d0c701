"""csrc/ compiled for tests: the CUDA kernels for the host, around cuda_emulator.h, or the CPU kernels of a copy."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from emo_megatron.ops.native import NativeOps

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator.h")
STABLE_ABI = "0x020b000000000000"
CSRC_VARIABLE = "EMO_TEST_CSRC"
"""Environment variable: compile the kernels in this folder instead of csrc/."""

Kernels = Literal["cuda", "cpu"]
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
        if folder.exists() and not target.exists():
            shutil.rmtree(folder)
        if not target.exists():
            _build(csrc, kernels, target)
        _loaded[kernels] = NativeOps(target, namespace=namespace_of(kernels))
    return _loaded[kernels]


def namespace_of(kernels: Kernels) -> str:
    """Where torch registers them, beside the package's own operators."""
    return f"emo_megatron_test_{kernels}"


def _build(csrc: Path, kernels: Kernels, target: Path) -> None:
    torch_dir = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    common = [
        *(compiler, "-std=c++17", "-fPIC", "-Wno-attributes", "-Wno-psabi", "-ffp-contract=off"),
        # few warps, so that also few tokens make each of them take several
        *(("-O1", "-DEMO_EMULATE", "-DEMO_WARPS_WANTED=16") if kernels == "cuda" else ("-O2",)),
        *(f"-DEMO_NAMESPACE={namespace_of(kernels)}", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"),
        *(f"-I{EMULATOR.parent}", f"-I{csrc}"),
        *(f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"),
    ]
    sources = [*sorted(csrc.glob("*.cu" if kernels == "cuda" else "*_cpu.cpp"))]
    sources += sorted(csrc.glob("binding*.cpp"))
    objects = [target.with_suffix(f".{source.name}.o") for source in sources]
    jobs = [
        [*common, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, jobs))
    # whole or not at all, also when several test processes build at once
    part = target.with_suffix(f".part{os.getpid()}")
    libraries = [f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu"]
    _run([compiler, "-shared", *map(str, objects), "-o", str(part), *libraries])
    part.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
