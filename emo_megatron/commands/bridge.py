"""The command bridge: train a recipe of Megatron-Bridge with pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from emo_megatron.environment import BRIDGE_INSTALL
from emo_megatron.files import say

INSTALL = BRIDGE_INSTALL
IS_IN_A_JOB = True


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a Megatron-Bridge (NeMo) recipe with document pools, as it is or under torchrun.

    torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe olmoe_7b_pretrain_config model.pool_min=8

    torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe qwen3_30b_a3b_pretrain_config model.pool_min=8
    model.pool_unrestricted=0.05 train.train_iters=100 checkpoint.save=runs/qwen3

    Options of the recipe that pools forbid are changed, and each change is printed. docs/bridge.md tells which.
    """

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """Fields of the recipe and their values, as Megatron-Bridge takes them. model.pool_min must be among them."""
    recipe: str = ""
    """A function of megatron.bridge.recipes or perf_recipes, by its name; or module:function for one of your own."""
    strict: bool = False
    """Refuse a recipe of which an option must change, instead of changing it."""
    list: bool = False
    """Print the MoE pretraining recipes and train nothing."""


def run(options: Options) -> str | None:
    """Train, or list the recipes; returns where the checkpoints lie, if there are any."""
    from emo_megatron.mcore import cpu
    from emo_megatron.mcore.compat import require_bridge

    if not (options.list or options.recipe):
        raise ValueError("--recipe must be given; --list prints the recipes")
    require_bridge()
    # before Bridge is imported, which asks for GPUs
    cpu.activate()
    from emo_megatron.bridge import command

    if options.list:
        say("\n".join(command.moe_recipes()))
        return None
    return command.run(options.recipe, options.overrides, strict=options.strict)
