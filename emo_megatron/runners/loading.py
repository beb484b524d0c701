"""Load this rank's part of a checkpoint's model for evaluation; only the flag `--load` is required.

Flags of the model come from the checkpoint. Flags of the command line override them and choose the parallel layout,
which may differ from the layout of the saved run. Pools are off, as in a deployed model.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from emo_megatron.checkpoint.model_flags import OneLineParser, fail
from emo_megatron.mcore import cpu

if TYPE_CHECKING:
    from emo_megatron.checkpoint.reader import MegatronCheckpoint

RUN_FLAGS = (
    *("--skip-train", "--no-load-optim", "--no-load-rng"),
    # all dispatchers compute the same result, and this dispatcher runs everywhere
    *("--moe-token-dispatcher-type", "alltoall"),
)
OTHER_SOURCES = (
    *("--load", "--ckpt-step", "--pretrained-checkpoint", "--finetune", "--use-checkpoint-args"),
    *("--non-persistent-ckpt-type", "--non-persistent-global-ckpt-dir", "--ckpt-format"),
    *("--auto-detect-ckpt-format", "--moe-use-upcycling", "--yaml-cfg", "--spec"),
)
"""Flags that would make Megatron load a checkpoint or build a model other than the one of --checkpoint."""
UNEVEN = (
    *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--pipeline-model-parallel-layout", "--account-for-embedding-in-pipeline-split"),
    "--account-for-loss-in-pipeline-split",
)
"""Flags that allow different numbers of layers in the pipeline stages."""
LONGEST_WORDS = 400
"""Largest number of characters shown of a message of Megatron, which may list every tensor."""
_PACKAGE = str(Path(__file__).resolve().parents[1])


def checkpoint_in(argv: Sequence[str]) -> MegatronCheckpoint:
    """The checkpoint of the flag `--load`."""
    cpu.activate()
    from emo_megatron.checkpoint.reader import MegatronCheckpoint

    given = [part.partition("=")[0] for part in argv]
    if "--load" not in given:
        raise ValueError("--load must name the checkpoint; got no --load")
    given.remove("--load")
    for flag in OTHER_SOURCES:
        if flag in given:
            raise ValueError(
                f"{flag} cannot be given: the model is always the stored model of --checkpoint; remove this flag from "
                "--megatron-args"
            )
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", type=Path)
    checkpoint = MegatronCheckpoint(parser.parse_known_args(list(argv))[0].load)
    if not checkpoint.moe_layers:
        raise ValueError(f"--checkpoint must be a model with routed experts; {checkpoint.path} has none")
    return checkpoint


def load_model(checkpoint: MegatronCheckpoint) -> tuple[torch.nn.Module, argparse.Namespace]:
    """Start Megatron with this process's arguments and load the model of `checkpoint_in`.

    Returns:
        This pipeline stage's model, unwrapped and in evaluation mode; and Megatron's flags.
    """
    from megatron.core.utils import unwrap_model
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    from emo_megatron.checkpoint.model_flags import model_flags
    from emo_megatron.checkpoint.source import check_routers, run_with
    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.args import check_run
    from emo_megatron.mcore.compat import use_compiled_index_builder
    from emo_megatron.mcore.mtp import use_packed_roll
    from emo_megatron.mcore.spec import pool_spec_builder

    check_layout(checkpoint, sys.argv[1:])
    use_compiled_index_builder()
    use_packed_roll()

    def add_all(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.error = fail  # type: ignore[method-assign]
        parser.set_defaults(**model_flags(checkpoint, parser, as_trained=True))
        return parser

    # Megatron requires batch sizes even without training
    batch = ("--micro-batch-size", "1", "--global-batch-size", os.environ.get("WORLD_SIZE", "1"))
    own = cpu.with_cpu_flags([*batch, *sys.argv[1:]])
    with run_with(checkpoint.path) as run:
        sys.argv[1:] = [*own, *RUN_FLAGS, "--load", str(run)]
        with megatron_errors():
            args = parse_and_validate_args(extra_args_provider=add_all)
        _balance_nothing(args)
        with megatron_errors():
            config = gpt_config_from_args(args)
        check_run(PoolConfig(), config.transformer, args)
        config.transformer_layer_spec = pool_spec_builder(PoolConfig())
        chunks = _build(args, config)
    if len(chunks) > 1:
        raise ValueError("interleaved pipelines are unsupported here; remove the flags of the virtual pipeline")
    model = unwrap_model(chunks[0]).eval()
    check_routers(model, checkpoint)
    return model, args


@contextlib.contextmanager
def megatron_errors(model: str = "the model") -> Iterator[None]:
    """Turn an assertion or exit of Megatron into a ValueError of one line; `model` names the model in that line."""
    try:
        yield
    except (AssertionError, SystemExit, ValueError, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            # report the error of one rank only
            cause = next(iter(error.failures.values()))[0]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # an exit that this package raises comes from a signal
        if isinstance(error, ValueError | SystemExit) and frame.filename.startswith(_PACKAGE):
            raise
        said = "" if isinstance(error, SystemExit) else " ".join(str(cause).split())
        said = said or f"{frame.line} ({frame.filename}, line {frame.lineno})"
        said = textwrap.shorten(said, LONGEST_WORDS, placeholder=" ...")
        raise ValueError(f"Megatron cannot build {model}: {said}") from error


@megatron_errors()
def _build(args: argparse.Namespace, config: Any) -> list[Any]:
    """This rank's part of the model of a configuration, with the weights of `--load`."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    initialize_megatron()
    chunks, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return list(chunks)


def _balance_nothing(args: argparse.Namespace) -> None:
    """Turn off the load-balancing losses of training, which do not affect evaluation."""
    from emo_megatron.checkpoint.model_flags import BALANCE_LOSSES

    kinds = args.moe_router_load_balancing_type
    # a type that is not a loss changes the routing: keep that type, so that the pool router reports it as unsupported
    if set(BALANCE_LOSSES).issuperset([kinds] if isinstance(kinds, str) else kinds):
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0


def check_layout(checkpoint: MegatronCheckpoint, argv: Sequence[str]) -> None:
    """Raise ValueError if the model cannot be split as the parallel layout requires.

    Args:
        checkpoint: checkpoint of the model.
        argv: Megatron's flags; the number of processes is the environment variable WORLD_SIZE.
    """
    tensor, pipeline, expert, context, expert_tensor = _sizes_in(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    stored = vars(checkpoint.args)
    layers, groups = stored.get("num_layers"), stored.get("num_query_groups")
    has_dense = layers != len(checkpoint.moe_layers) - len(checkpoint.prediction_layers)
    # Megatron repeats query groups if there are fewer groups than ranks
    is_cut = stored.get("group_query_attention") and groups and tensor % groups
    is_even = not any(part.partition("=")[0] in UNEVEN for part in argv)
    embedding = checkpoint.names.get("embedding.word_embeddings.weight")
    vocabulary = None if embedding is None else embedding.shape[0]
    by_tensor = ("--tensor-parallel", tensor)
    # per row: a size (None: not checked), its name, the option that splits it, and the number of parts
    cuts = (
        (vocabulary, "rows of the vocabulary", *by_tensor),
        (stored.get("num_attention_heads"), "attention heads", *by_tensor),
        (groups if is_cut else None, "query groups", *by_tensor),
        (stored.get("ffn_hidden_size") if has_dense else None, "(--ffn-hidden-size)", *by_tensor),
        (stored.get("moe_shared_expert_intermediate_size"), "(the shared expert)", *by_tensor),
        (
            stored.get("moe_ffn_hidden_size"),
            "(--moe-ffn-hidden-size)",
            *("--expert-tensor-parallel-size", expert_tensor),
        ),
        (stored.get("num_experts"), "experts", "--expert-parallel", expert),
        (layers if is_even else None, "layers", "--pipeline-parallel", pipeline),
        (processes, "processes", *("--tensor-parallel times --pipeline-parallel,", tensor * pipeline * context)),
        (processes // pipeline, "processes of a pipeline stage", *("--expert-parallel", expert * expert_tensor)),
    )
    problems = [
        f"{size} {what} must be a multiple of {option} {parts}"
        for size, what, option, parts in cuts
        if size and size % parts
    ]
    if problems:
        raise ValueError(f"{checkpoint.path} cannot run in this layout: {'; '.join(problems)}")


def check_rows(seq_length: int, *, rows: int, args: argparse.Namespace) -> None:
    """Raise ValueError if the tokens of a micro-batch cannot be split evenly over the tensor-parallel ranks."""
    ranks = args.tensor_model_parallel_size
    if seq_length * rows % ranks:
        raise ValueError(
            f"--seq-length {seq_length} times --micro-batch-size {rows} must be a multiple of --tensor-parallel {ranks}"
        )


def _sizes_in(argv: Sequence[str]) -> tuple[int, int, int, int, int]:
    """Sizes of the tensor, pipeline, expert, context and expert-tensor parallelism in Megatron's flags."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    for name in ("tensor-model", "pipeline-model", "expert-model", "context"):
        parser.add_argument(f"--{name}-parallel-size", dest=name, type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", dest="expert-tensor", type=int)
    given = vars(parser.parse_known_args(list(argv))[0])
    given["expert-tensor"] = given["expert-tensor"] or given["tensor-model"]
    # Megatron itself reports sizes below 1
    tensor, pipeline, expert, context, expert_tensor = (max(1, size) for size in given.values())
    return tensor, pipeline, expert, context, expert_tensor
