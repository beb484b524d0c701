"""Run one of Megatron's own scripts, unmodified, on a machine without a GPU.

    torchrun --nproc-per-node 2 -m emo_megatron.mcore.on_cpu pretrain_gpt.py <flags of pretrain_gpt.py>

Megatron must find the CPU when it is imported, before it reads any flag. Therefore this module starts the script. With
a GPU, this module only runs the script, unless EMO_DEVICE=cpu is set.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from emo_megatron.mcore import cpu


def main() -> None:
    """Make the CPU Megatron's device, add the flags of a CPU run before the script's own flags, and run the script."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(
            f"usage: python -m emo_megatron.mcore.on_cpu SCRIPT [FLAGS], where SCRIPT is a file; got {sys.argv[1:]}"
        )
    script = sys.argv[1]
    # the script imports modules from its own folder, as with `python SCRIPT`
    sys.path.insert(0, str(Path(script).resolve().parent))
    cpu.activate()
    sys.argv = [script, *cpu.with_cpu_flags(sys.argv[2:])]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
