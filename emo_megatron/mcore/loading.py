"""The model of a checkpoint on this process's ranks, to run and not to train: `--load` is the only flag it needs.

The flags that make the model are those stored in the checkpoint; flags of the command line win, and choose the layout,
which may be another than the one that was saved. Pools are off, as in a model that is deployed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from emo_megatron.mcore import cpu

if TYPE_CHECKING:
    from emo_megatron.mcore.weights import MegatronCheckpoint

MODEL_GROUPS = (
    *("transformer configuration", "network size", "tokenizer"),
    *("moe", "mla", "experimental_attention_variant", "heterogeneous architecture"),
)
"""Groups of Megatron's flags that make the model, and some of its run."""
MODEL_FLAGS = ("seq_length",)
"""Flags of other groups that do."""
NOT_THE_MODEL = re.compile(
    "parallel|comm|overlap|recompute|offload|graph|fusion|fused|nccl|tp_|wgrad|initialization|backend|pipeline"
    "|inference|fp8|fp4|flash|checkpoint|transformer_impl|dispatcher|deepep|hybridep|padding|logger|vpp|dp_cp|encoder|decoder"
)
"""Flags of those groups that say how to compute."""
RUN_FLAGS = (
    *("--skip-train", "--no-load-optim", "--no-load-rng"),
    # every dispatcher computes the same, and this one runs everywhere
    *("--moe-token-dispatcher-type", "alltoall"),
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation.

    Attributes:
        model: this pipeline stage, unwrapped.
        args: Megatron's flags.
    """

    model: torch.nn.Module
    args: argparse.Namespace


def checkpoint_in(argv: Sequence[str]) -> MegatronCheckpoint:
    """The checkpoint that `--load` names.

    Raises:
        ValueError: there is no `--load`, or no checkpoint where it points.
    """
    cpu.activate()
    from emo_megatron.mcore.weights import MegatronCheckpoint

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", type=Path)
    path = parser.parse_known_args(list(argv))[0].load
    if path is None:
        raise ValueError("--load must name the checkpoint")
    return MegatronCheckpoint(path)


def load_model(
    checkpoint: MegatronCheckpoint,
    *,
    add_args: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
    check: Callable[[argparse.Namespace], None] = lambda args: None,
    flags: Sequence[str] = (),
) -> LoadedModel:
    """Start Megatron with this process's arguments and load a model.

    Args:
        checkpoint: of `checkpoint_in`.
        add_args: adds the command's own flags to Megatron's parser.
        check: raises ValueError for flags that cannot be; called before anything is built.
        flags: more of Megatron's flags, which the command line's win over.

    Raises:
        ValueError: the checkpoint lacks its run's flags, or the model cannot be run.
    """
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import unwrap_model
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.args import check_run
    from emo_megatron.mcore.compat import use_compiled_index_builder
    from emo_megatron.mcore.spec import pool_spec_builder

    use_compiled_index_builder()

    def add_all(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_args(parser)
        parser.set_defaults(**_model_flags(parser, checkpoint.args))
        return parser

    # Megatron wants batches even where nothing is trained
    batch = ("--micro-batch-size", "1", "--global-batch-size", os.environ.get("WORLD_SIZE", "1"))
    own = cpu.with_cpu_flags([*batch, *flags, *sys.argv[1:]])
    sys.argv[1:] = [*own, *RUN_FLAGS, *_place(checkpoint.path)]
    args = parse_and_validate_args(extra_args_provider=add_all)
    check(args)
    _balance_nothing(args)
    config = gpt_config_from_args(args)
    check_run(PoolConfig(), config.transformer, args)
    config.transformer_layer_spec = pool_spec_builder(PoolConfig())
    initialize_megatron()
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if len(chunks) > 1:
        raise ValueError("a model is run without interleaving; drop the virtual pipeline's flags")
    return LoadedModel(model=unwrap_model(chunks[0]).eval(), args=args)


def _balance_nothing(args: argparse.Namespace) -> None:
    """Forget how training balanced the load, which a model that is only run does not depend on."""
    kinds = args.moe_router_load_balancing_type
    # sinkhorn is no loss but another routing, which the pool router refuses with its reason
    if "sinkhorn" not in ([kinds] if isinstance(kinds, str) else kinds):
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0


def _model_flags(parser: argparse.ArgumentParser, stored: argparse.Namespace) -> dict[str, Any]:
    """What of the stored flags makes the model, by the parser's names."""
    names = {
        action.dest
        for group in parser._action_groups
        for action in group._group_actions
        if (group.title in MODEL_GROUPS and not NOT_THE_MODEL.search(action.dest))
        or action.dest in MODEL_FLAGS
    }
    return {name: getattr(stored, name) for name in names if hasattr(stored, name)}


def _place(folder: Path) -> list[str]:
    """`--load` and the iteration, whether the folder of a run was named or one iteration's in it."""
    found = re.fullmatch(r"iter_(\d+)", folder.name)
    return ["--load", str(folder.parent), *(("--ckpt-step", str(int(found[1]))) if found else ())]
