"""Compile the library of kernels for this GPU in several variants, wait for a usable library, compare kernel times.

builds.py make FOLDER --logs LOGS [--variants default ...]     writes FOLDER/VARIANT.so, in the given order
builds.py wait FOLDER --logs LOGS                              waits until the package has a library that works
builds.py compare FOLDER --output FOLDER                       runs kernels.py with each variant, in turns
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {"default": ""} | {f"warps-{warps}": f"-DEMO_WARPS_WANTED={warps}" for warps in (4096, 8192)}
"""What nvcc gets beside this GPU's architecture; by default 2048 warps are wanted."""
NEEDED = ("csrc", "emo_megatron", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BROUGHT = "brought"
SIZES = ["--tokens", "8192", "32768", "65536", "--experts", "128"]
"""Where the number of warps matters."""


def make(folder: Path, *, logs: Path, variants: list[str]) -> None:
    """Compile a copy of the sources, once for each variant. FOLDER/VARIANT.failed says that one does not compile."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / name)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    for variant in variants:
        # -v: ptxas says how many registers every kernel takes
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas -v {VARIANTS[variant]}"
        environment = os.environ | {"EMO_BUILD": "1", "EMO_CUDA": "1", "NVCC_APPEND_FLAGS": flags}
        started = time.monotonic()
        with (logs / f"{variant}.txt").open("w") as log:
            done = subprocess.run(build, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        took = f"{time.monotonic() - started:.0f} s"
        if done.returncode:
            (folder / f"{variant}.failed").touch()
            print(f"{variant}: exit status {done.returncode} after {took}")
            continue
        (tree / "emo_megatron" / "_native.so").replace(folder / f"{variant}.so")
        print(f"{variant}: compiled in {took}")


def wait(folder: Path, *, logs: Path, device: str) -> None:
    """Until the package's own library works here; one that is missing or does not is replaced by what is compiled."""
    from emo_megatron import ops
    from emo_megatron.ops import native

    reason = ops.why_not_native(device)
    if not reason:
        print(f"{native.LIBRARY.name} as brought, {native.LIBRARY.stat().st_size} bytes, works")
        return
    print(f"waiting for the compiler: {reason}", flush=True)
    if not folder.exists():
        # a library was brought, so nothing is being compiled, but not one for this device
        make(folder, logs=logs, variants=["default"])
    made = folder / "default.so"
    while not made.exists():
        if made.with_suffix(".failed").exists():
            sys.exit("it does not compile: see default.txt in the archive")
        time.sleep(0.2)
    part = native.LIBRARY.with_suffix(".part")
    shutil.copy2(made, part)
    part.replace(native.LIBRARY)
    # the operators of a library that was loaded stay: look again in a new process
    look = f"from emo_megatron import ops; import sys; sys.exit(ops.why_not_native({device!r}))"
    subprocess.run([sys.executable, "-c", look], check=True)
    print(f"{native.LIBRARY.name} compiled here works")


def compare(folder: Path, *, device: str, output: Path, is_quick: bool) -> None:
    """Time the routing kernels of every library at a few sizes, each in a process of its own."""
    # the most telling first: the step may be ended
    paths = {name: folder / f"{name}.so" for name in VARIANTS}
    libraries = {name: path for name, path in paths.items() if path.exists()}
    libraries |= {BROUGHT: ROOT / "emo_megatron" / "_native.so"}
    missing = [path.stem for path in folder.glob("*.failed")]
    if len(libraries) == 1:
        sys.exit("nothing was compiled in time to compare with; see builds/ in the archive")
    sizes = ["--quick"] if is_quick else SIZES
    rows = []
    for name, library in libraries.items():
        place = output / name
        place.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("kernels.py")), *sizes]
        command += ["--ops", "routing", "--device", device, "--library", str(library)]
        done = subprocess.run([*command, "--output", str(place)], stdout=subprocess.DEVNULL)
        if done.returncode:
            missing.append(name)
            continue
        with (place / "kernels.csv").open(newline="") as file:
            rows += [row | {"library": name} for row in csv.DictReader(file)]
        # whole after every library: the step may be ended
        (output / "builds.md").write_text(_page(rows, missing))
    print(f"{len(libraries)} libraries; failed: {', '.join(missing) or 'none'}")
    sys.exit(1 if missing else 0)


def _page(rows: list[dict[str, str]], missing: list[str]) -> str:
    """One row a kernel and size, one column a library, microseconds."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in ("dtype", "experts", "tokens", "kernel", "layout"))

    names = list(dict.fromkeys(row["library"] for row in rows))
    lines = ["# Builds, microseconds", ""]
    lines += [f"Failed: {', '.join(missing)}.", ""] if missing else []
    lines += ["| " + " | ".join(["dtype", "E", "T", "kernel", "ids", *names]) + " |"]
    lines += ["| --- " * 5 + "| --: " * len(names) + "|"]
    for case, group in groupby(sorted(rows, key=key), key=key):
        times = {row["library"]: row["median_us"] for row in group}
        lines.append("| " + " | ".join([*case, *(times.get(name, "") for name in names)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("make", "wait", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.task == "make":
        make(options.folder, logs=options.logs, variants=options.variants)
    elif options.task == "wait":
        wait(options.folder, logs=options.logs, device=options.device)
    else:
        compare(options.folder, device=options.device, output=options.output, is_quick=options.quick)


if __name__ == "__main__":
    main()
