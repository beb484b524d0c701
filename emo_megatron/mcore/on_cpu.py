"""Run one of Megatron's own scripts, unmodified, where there is no GPU.

    torchrun --nproc-per-node 2 -m emo_megatron.mcore.on_cpu pretrain_gpt.py <its flags>

Megatron must find the CPU when it is imported, which is before any of its flags is read, so the script is started from
here. Where there is a GPU this is the script as it is.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from emo_megatron.mcore import cpu


def main() -> None:
    """Make the CPU Megatron's device, put the flags it needs in front of the script's own, and run the script."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: python -m emo_megatron.mcore.on_cpu SCRIPT [FLAGS]; got {sys.argv[1:]}")
    script = sys.argv[1]
    # its neighbours are imported from beside it, as if python had been called with it
    sys.path.insert(0, str(Path(script).resolve().parent))
    cpu.activate()
    sys.argv = [script, *cpu.with_cpu_flags(sys.argv[2:])]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
