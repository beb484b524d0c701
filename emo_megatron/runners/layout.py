"""Whether a model can be cut into the parts of a layout, told before Megatron starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emo_megatron.checkpoint.model_flags import OneLineParser

if TYPE_CHECKING:
    # it imports Megatron, which the CPU's stand-ins must precede
    from emo_megatron.checkpoint.reader import MegatronCheckpoint

UNEVEN = (
    *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--pipeline-model-parallel-layout", "--account-for-embedding-in-pipeline-split"),
    "--account-for-loss-in-pipeline-split",
)
"""Flags with which stages of a pipeline may differ."""


def check_layout(checkpoint: MegatronCheckpoint, argv: Sequence[str]) -> None:
    """Refuse a layout that a model cannot be cut into.

    Args:
        checkpoint: of the model.
        argv: Megatron's flags; the number of processes is WORLD_SIZE in the environment.

    Raises:
        ValueError: naming every option that does not fit, with its number and what it would have to divide.
    """
    tensor, pipeline, expert, context, expert_tensor = _sizes_in(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    stored = vars(checkpoint.args)
    layers, groups = stored.get("num_layers"), stored.get("num_query_groups")
    has_dense = layers != len(checkpoint.moe_layers)
    # fewer query groups than ranks are repeated
    is_cut = stored.get("group_query_attention") and groups and tensor % groups
    is_even = not any(part.partition("=")[0] in UNEVEN for part in argv)
    embedding = checkpoint.names.get("embedding.word_embeddings.weight")
    vocabulary = None if embedding is None else embedding.shape[0]
    by_tensor = ("--tensor-parallel", tensor)
    # how many of what there are, and the option by which they are cut in so many parts; None: not at all
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
        f"{size} {what} do not divide by {option} {parts}"
        for size, what, option, parts in cuts
        if size and size % parts
    ]
    if problems:
        raise ValueError(f"{checkpoint.path} cannot be run so: {'; '.join(problems)}")


def check_rows(seq_length: int, *, rows: int, args: argparse.Namespace) -> None:
    """Refuse rows of so many tokens, so many at once, that the ranks of a layer cannot share.

    Raises:
        ValueError: naming the options.
    """
    ranks = args.tensor_model_parallel_size
    if seq_length * rows % ranks:
        raise ValueError(f"--seq-length {seq_length} times --rows {rows} does not divide by --tensor-parallel {ranks}")


def _sizes_in(argv: Sequence[str]) -> tuple[int, int, int, int, int]:
    """Ranks of the tensor, pipeline, expert, context and expert-tensor parallelism that Megatron's flags ask for."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    for name in ("tensor-model", "pipeline-model", "expert-model", "context"):
        parser.add_argument(f"--{name}-parallel-size", dest=name, type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", dest="expert-tensor", type=int)
    given = vars(parser.parse_known_args(list(argv))[0])
    given["expert-tensor"] = given["expert-tensor"] or given["tensor-model"]
    # what is no size at all, Megatron refuses
    tensor, pipeline, expert, context, expert_tensor = (max(1, size) for size in given.values())
    return tensor, pipeline, expert, context, expert_tensor
