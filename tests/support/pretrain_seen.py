"""A pretraining script that prints a line of JSON more: the flags, and over them the configuration of a router.

It is examples/pretrain_emo.py, or the one whose path is the first argument, run as emo_megatron.mcore.on_cpu runs it.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from emo_megatron.mcore import cpu  # noqa: E402

cpu.activate()

from megatron.training import get_args  # noqa: E402

from emo_megatron.mcore.router import PoolRouter  # noqa: E402

build = PoolRouter.__init__
shown: list[PoolRouter] = []


def build_and_show(self: PoolRouter, *args: Any, **kwargs: Any) -> None:
    build(self, *args, **kwargs)
    if not shown:
        shown.append(self)
        fields = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        print("SEEN", json.dumps(vars(get_args()) | fields, default=str), flush=True)


PoolRouter.__init__ = build_and_show  # type: ignore[method-assign]
script = ROOT / "examples" / "pretrain_emo.py"
if sys.argv[1].endswith(".py"):
    script = Path(sys.argv.pop(1))
    sys.argv[1:] = cpu.with_cpu_flags(sys.argv[1:])
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
