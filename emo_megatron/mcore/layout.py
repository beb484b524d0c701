"""Whether a model can be cut into the parts of a layout, told before Megatron starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from emo_megatron.mcore.weights import MegatronCheckpoint

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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for kind in ("tensor-model", "pipeline-model", "expert-model", "context"):
        parser.add_argument(f"--{kind}-parallel-size", type=int, default=1)
    parser.add_argument("--expert-tensor-parallel-size", type=int)
    given, _ = parser.parse_known_args(list(argv))
    tensor, pipeline = given.tensor_model_parallel_size, given.pipeline_model_parallel_size
    expert, expert_tensor = given.expert_model_parallel_size, given.expert_tensor_parallel_size
    stored = vars(checkpoint.args)
    rows = checkpoint.names["embedding.word_embeddings.weight"].shape[0]
    groups = stored.get("num_query_groups") if stored.get("group_query_attention") else None
    has_dense = len(checkpoint.moe_layers) < stored.get("num_layers", 0)
    is_even = not any(part.partition("=")[0] in UNEVEN for part in argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    by_tensor = ("--tensor-parallel", tensor)
    by_experts = ("--expert-tensor-parallel-size", expert_tensor or tensor)
    # what, how many, by which option, in how many parts; what the model lacks divides by anything
    cuts = (
        ("the vocabulary's rows", rows, *by_tensor),
        ("the attention heads", stored.get("num_attention_heads"), *by_tensor),
        # fewer query groups than ranks are repeated
        ("the query groups", groups if groups and tensor % groups else None, *by_tensor),
        ("--ffn-hidden-size", stored.get("ffn_hidden_size") if has_dense else None, *by_tensor),
        ("the shared expert", stored.get("moe_shared_expert_intermediate_size"), *by_tensor),
        ("--moe-ffn-hidden-size", stored.get("moe_ffn_hidden_size"), *by_experts),
        ("the experts", stored.get("num_experts"), "--expert-parallel", expert),
        (
            "the layers",
            stored.get("num_layers") if is_even else None,
            *("--pipeline-parallel", pipeline),
        ),
        (
            "the processes",
            processes,
            "--tensor-parallel times --pipeline-parallel",
            tensor * pipeline * given.context_parallel_size,
        ),
        (
            "the processes of a pipeline stage",
            processes // pipeline,
            *("--expert-parallel", expert * by_experts[1]),
        ),
    )
    problems = [
        f"{what}, {size}, do not divide by {option}, {parts}"
        for what, size, option, parts in cuts
        if size and parts > 1 and size % parts
    ]
    if problems:
        raise ValueError(f"{checkpoint.path} cannot be run so: {'; '.join(problems)}")
