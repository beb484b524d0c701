"""Checkpoints of a tiny pool model, written and loaded by Megatron under any layout, and what the models then say.

Ranks import this file by its path, so it names its neighbours whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNEQUAL = {"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
"""A dense layer before three MoE layers; without it, all layers are equal and Megatron stacks them."""
BIASED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
"""A router with a buffer of the experts' own, which `model` gives values too."""
ORDER = ((3, 0, 7, 4, 1, 2, 6, 5), (7, 6, 5, 4, 3, 2, 1, 0))
"""Of the experts of two layers."""
ARGS = {
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_layers": 2,
    "hidden_size": 32,
    "pool_min": 3,
    "pool_max": 6,
    "pool_min_decay_samples": 0,
    "tensor_model_parallel_size": 2,
    "consumed_train_samples": 1000,
    "padded_vocab_size": 64,
}


def model(config: dict[str, Any], *, layout: dict[str, int], stock: bool = False, seed: int = 5) -> Any:
    """The model on this rank, its values by name and seed alone."""
    from emo_megatron.config import PoolConfig
    from support import shards, tiny

    tiny.setup(**{"expert_tensor_parallel_size": 1} | layout)
    built = tiny.model(None if stock else PoolConfig(pool_min=3), **config)
    shards.initialise([built], seed=seed)
    return built


def save(
    folder: str,
    *,
    layout: dict[str, int],
    config: dict[str, Any],
    singletons: bool = False,
    source: str | None = None,
    seed: int = 5,
    args: dict[str, Any] = ARGS,
) -> dict[str, Tensor]:
    """Write a model as Megatron's training does, with the values of `source`, another checkpoint, if that is given.

    Returns its state by the names that the reader gives, where one rank has all of it.
    """
    from megatron.core import dist_checkpointing, parallel_state

    built = model(config, layout=layout, seed=seed)
    if source is not None:
        load(source, built)
    path = Path(folder) / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
    torch.distributed.barrier()
    metadata = {"singleton_local_shards": singletons}
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    stored = ("num_layers", "moe_router_num_groups", "moe_router_group_topk", "mtp_num_layers")
    stored += ("mtp_use_repeated_layer",)
    flags = argparse.Namespace(**args | {k: v for k, v in config.items() if k in stored})
    state = built.sharded_state_dict(metadata=metadata | groups)
    common = {"args": flags, "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save({"model": state} | common, str(path), content_metadata=metadata)
    return expected(built)


def save_run(
    folder: str, *, layout: dict[str, int], config: dict[str, Any], tokenizer: str | None = None, **changes: Any
) -> None:
    """Write a model with the flags of its run, tokenizer and pools included; `changes` are of its Architecture."""
    from emo_megatron.hf.mapping import FUSED_NORM, Architecture
    from emo_megatron.hf.megatron import flags_of
    from support import tiny

    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "top_k": 2}
    sizes |= {"expert_hidden": 16, "shared_hidden": 16, "norm_eps": 1e-5}
    flags = flags_of(
        Architecture(**sizes | changes),
        dtype=torch.float32,
        moe_norm=FUSED_NORM,
        pools={"pool_min": 3},
        tokenizer=tokenizer and Path(tokenizer),
    )
    run = {"consumed_train_samples": 16, "seq_length": 64}
    save(folder, layout=layout, config=config, args=vars(flags) | run)


def expected(built: Any) -> dict[str, Tensor]:
    """The weights of a whole model by the reader's names."""
    found: dict[str, Any] = {}
    for name, value in built.state_dict().items():
        if "_extra_state" in name:
            continue
        stem, _, rest = name.partition(".mlp.experts.local_experts.")
        if rest:
            expert, _, tensor = rest.partition(".")
            found.setdefault(f"{stem}.mlp.experts.experts.{tensor}", {})[int(expert)] = value
        else:
            # a checkpoint names a norm by the projection that it feeds
            name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
            found[name] = value
    # the module of multi-token prediction has another name in a checkpoint
    found = {name.replace(".mtp_model_layer.", ".transformer_layer."): value for name, value in found.items()}
    return {
        name: torch.stack([value[e] for e in sorted(value)]) if isinstance(value, dict) else value
        for name, value in found.items()
    }


def load(folder: str, built: Any) -> None:
    """Load a checkpoint of weights as Megatron's training does: names by what the checkpoint says of itself."""
    from megatron.core import dist_checkpointing, parallel_state

    tracker = (Path(folder) / "latest_checkpointed_iteration.txt").read_text()
    path = str(Path(folder) / (tracker if tracker == "release" else f"iter_{int(tracker):07d}"))
    metadata = dist_checkpointing.load_content_metadata(path) or {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = built.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
    built.load_state_dict(dist_checkpointing.load({"model": state}, path)["model"])


def logits(
    folder: str,
    *,
    layout: dict[str, int],
    config: dict[str, Any],
    stock: bool = False,
    allowed: list[list[bool]] | None = None,
) -> Tensor | None:
    """Logits of fixed tokens from a checkpoint, on ranks of the last pipeline stage and tensor rank 0.

    Of Megatron's own layers and router if `stock`; `allowed` [L, E] are experts that routers are limited to.
    """
    return forward(_loaded(folder, layout=layout, config=config, stock=stock, allowed=allowed))


def head_logits(
    folder: str,
    *,
    layout: dict[str, int],
    config: dict[str, Any],
    stock: bool = False,
    allowed: list[list[bool]] | None = None,
) -> Tensor:
    """[1 + depths, s, b, V] logits of fixed tokens on one rank, of every depth of multi-token prediction, main last.

    The arguments are those of `logits`.
    """
    from support import tiny

    built = _loaded(folder, layout=layout, config=config, stock=stock, allowed=allowed)
    seen: list[Tensor] = []
    built.output_layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output[0].clone()))
    tokens = torch.randint(tiny.VOCAB, (2, tiny.SEQ), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        built(tokens, torch.arange(tiny.SEQ).expand(2, -1), None, labels=tokens.roll(-1, dims=1))
    return torch.stack(seen)


def _loaded(
    folder: str, *, layout: dict[str, int], config: dict[str, Any], stock: bool, allowed: list[list[bool]] | None
) -> Any:
    """A checkpoint's model in evaluation mode, with routers limited to `allowed`."""
    from emo_megatron.mcore.router import PoolRouter

    built = model(config, layout=layout, stock=stock, seed=6).eval()
    load(folder, built)
    if allowed is not None:
        routers = [m for m in built.modules() if isinstance(m, PoolRouter)]
        for router, row in zip(routers, allowed, strict=True):
            router.allowed_experts = torch.tensor(row)
    return built


@torch.no_grad()
def forward(built: Any) -> Tensor | None:
    """Logits [b, s, V] of fixed tokens, through the pipeline's stages if there are several."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from support import tiny

    tokens = torch.randint(tiny.VOCAB, (2, tiny.SEQ), generator=torch.Generator().manual_seed(9))
    seen: list[Tensor] = []

    def step(iterator: Any, stage: Any) -> Any:
        output = stage(tokens, torch.arange(tiny.SEQ).expand(2, -1), None)

        def keep(result: Tensor, non_loss_data: bool = False) -> Any:
            seen.append(result.detach().clone())
            return result.sum(), {}

        return output, keep

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=built,
        num_microbatches=1,
        seq_length=tiny.SEQ,
        micro_batch_size=2,
        forward_only=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = gather_from_tensor_model_parallel_region(seen[0])
    return whole if parallel_state.get_tensor_model_parallel_rank() == 0 else None


def report(folder: Path) -> dict[str, Any]:
    """What a composition or a merge says of itself."""
    return dict(json.loads((folder / "report.json").read_text()))


def selection_of(folder: Path, kept: list[list[int]], **changes: Any) -> Any:
    """The Selection that keeps these experts, layer by layer, of a checkpoint's model."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.experts.selection import Selection

    parent = MegatronCheckpoint(folder)
    fields: dict[str, Any] = {
        "num_experts": 8,
        "experts": tuple(map(tuple, kept)),
        "layers": parent.moe_layers,
        "method": "mean_prob",
        "seed": None,
        "model": parent.fingerprint,
        "data": {"documents": 3},
    }
    return Selection(**fields | changes)


def placement_of(folder: Path, **changes: Any) -> Any:
    """The Placement of a checkpoint's experts on two ranks, in ORDER."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.experts.placement import Placement

    model = MegatronCheckpoint(folder)
    fields: dict[str, Any] = {
        "num_experts": 8,
        "num_ranks": 2,
        "layers": model.moe_layers,
        "order": ORDER,
        "model": model.fingerprint,
        "method": "together",
        "max_imbalance": 1.1,
    }
    return Placement(**fields | changes)


def weights_of(layout: dict[str, int], config: dict[str, Any]) -> list[Any]:
    """Name, layer and expert of each weight of a model, as this rank tells them."""
    from emo_megatron.runners.megatron_hooks import model_weights

    return [weight[:3] for weight in model_weights(model(config, layout=layout))]
