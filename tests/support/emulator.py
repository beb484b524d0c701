"""The CUDA kernels as torch operators that run on a CPU: csrc/ compiled for the host around cuda_emulator.h."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from emo_megatron.ops.native import NativeOps

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
EMULATOR = Path(__file__).with_name("cuda_emulator.h")
STABLE_ABI = "0x020b000000000000"


def build(csrc: Path, target: Path, *, namespace: str, optimize: str = "-O1") -> Path:
    """Compile the kernels in a copy of csrc/ and their binding for the emulator, unless `target` exists."""
    if target.exists():
        return target
    torch_dir = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    common = [
        *(os.environ.get("CXX", "c++"), "-std=c++17", optimize, "-fPIC", "-Wno-attributes"),
        *("-DEMO_EMULATE", f"-DEMO_NAMESPACE={namespace}", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"),
        *(f"-I{EMULATOR.parent}", f"-I{csrc}"),
        *(f"-I{torch_dir}/include", f"-I{torch_dir}/include/torch/csrc/api/include"),
    ]
    sources = [*sorted(csrc.glob("*.cu")), *sorted(csrc.glob("binding*.cpp"))]
    objects = [target.with_suffix(f".{source.name}.o") for source in sources]
    jobs = [
        [*common, "-x", "c++", "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, jobs))
    part = target.with_suffix(".part")
    libraries = [f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu"]
    _run([common[0], "-shared", *map(str, objects), "-o", str(part), *libraries])
    part.replace(target)
    return target


def load_emulated(namespace: str = "emo_megatron_emulated") -> NativeOps:
    """The kernels of this checkout, compiled once for each state of the sources."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [*sorted(CSRC.iterdir()), EMULATOR]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulator"
    target = folder / f"{digest.hexdigest()[:16]}.so"
    if folder.exists() and not target.exists():
        shutil.rmtree(folder)
    return NativeOps(build(CSRC, target, namespace=namespace), namespace=namespace)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
