"""Print GPU, driver, clocks and versions of this machine; write packages and the full output of nvidia-smi to files."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import torch
from inputs import parser

from emo_megatron.environment import collect_environment, format_text

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current"


def main() -> None:
    """Print, write."""
    options = parser(__doc__).parse_args()
    names = {f"{d.name.lower()} {d.version}" for d in importlib.metadata.distributions()}
    (options.output / "packages.txt").write_text("\n".join(sorted(names)) + "\n")
    tell(options.output / "nvidia-smi.txt", "nvidia-smi", "-q")
    tell(None, "nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv")
    print(format_text(collect_environment()))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, python {sys.executable}")
    if options.device == "cuda":
        found = torch.cuda.get_device_properties(0)
        cache = getattr(found, "L2_cache_size", 0) / 2**20
        print(f"{found.multi_processor_count} SMs, {cache:.0f} MiB of level 2 cache")
        print(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    else:
        print(f"no GPU is used; torch {torch.__version__}")


def tell(path: Path | None, *command: str) -> None:
    """Run a tool; what it says goes to the file or the log. A missing one is no failure."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        text = f"{command[0]}: {error}\n"
    if path:
        path.write_text(text)
    else:
        print(text.rstrip())


if __name__ == "__main__":
    main()
