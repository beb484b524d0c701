"""The command bridge: train a Megatron-Bridge recipe with pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from emo_megatron.environment import BRIDGE_INSTALL
from emo_megatron.files import say

INSTALL = BRIDGE_INSTALL
IS_IN_A_JOB = True


def _unset(metavar: str, default: str) -> Any:
    """As commands.options.unset, whose module imports torch."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a Megatron-Bridge (NeMo) recipe with document pools, in one process or under torchrun.

    torchrun --nproc-per-node 8 -m emo_megatron bridge --recipe olmoe_7b_pretrain_config model.pool_min=8
    model.moe_router_load_balancing_type=global_aux_loss model.moe_aux_loss_coeff=0.00625
    dataset.data_path=data/web_text_document checkpoint.save=runs/olmoe checkpoint.load=runs/olmoe

    Options of the recipe that pools do not support are changed, and each change is printed. docs/bridge.md lists these
    options.
    """

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], _unset("FIELD=VALUE ...", "none")] = ()
    """Fields of the recipe and their new values, in Megatron-Bridge's syntax. model.pool_min is required."""
    recipe: Annotated[str, _unset("NAME", "none; required without --list")] = ""
    """Name of a function in megatron.bridge.recipes or perf_recipes; or module:function for your own recipe."""
    strict: bool = False
    """Stop with an error instead of changing an option of the recipe."""
    list: bool = False
    """Print the names of the MoE pretraining recipes, and train nothing."""


def run(options: Options) -> str | None:
    """Train, or list the recipes; returns the folder of the checkpoints, if there are any."""
    from emo_megatron.mcore import cpu
    from emo_megatron.mcore.compat import require_bridge

    if not (options.list or options.recipe):
        raise ValueError("--recipe must be given; --list prints the recipes")
    require_bridge()
    # before the import of Bridge, which requires GPUs
    cpu.activate()
    from emo_megatron.bridge import command

    if options.list:
        say("\n".join(command.moe_recipes()))
        return None
    return command.run(options.recipe, options.overrides, strict=options.strict)
