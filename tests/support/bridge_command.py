"""The command bridge where Transformer Engine and GPUs are missing, and recipes for it that fit a CPU.

`python -m support.bridge_command bridge ...` is `python -m emo_megatron bridge ...` with stand-ins around the import of
Bridge; `--recipe support.bridge_command:small_olmoe` is one of the recipes. They save into $FOLDER. `answers CALLS` are
many such commands, JSON of name -> arguments, and prints JSON of what they answer.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from support import bridge_recipes
from support.bridge_stand_ins import stand_ins

with stand_ins():
    from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config

    import emo_megatron.bridge.command  # noqa: F401

import torch

from emo_megatron import cli

STEPS = 2


def small_olmoe() -> Any:
    """The OLMoE recipe; Megatron's local layers have no norm over all of its heads."""
    folder = Path(os.environ["FOLDER"])
    return bridge_recipes.shrink(olmoe_7b_pretrain_config(), folder, steps=STEPS, qk_layernorm=False)


def with_mtp() -> Any:
    """The same with a layer of multi-token prediction."""
    cfg = small_olmoe()
    cfg.model.mtp_num_layers = 1
    return cfg


def needs_arguments(size: int) -> Any:
    """A recipe that the command cannot call."""
    raise NotImplementedError(size)


def returns_nothing() -> None:
    """No recipe."""


def answer(arguments: list[str]) -> tuple[int, str, str, bool]:
    """Exit status, what was printed and said on stderr, and whether there was a process group."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["bridge", *arguments])
    return status, out.getvalue(), err.getvalue(), torch.distributed.is_initialized()


if __name__ == "__main__":
    if sys.argv[1] == "answers":
        print(json.dumps({name: answer(arguments) for name, arguments in json.loads(sys.argv[2]).items()}))
        sys.exit()
    sys.exit(cli.main())
