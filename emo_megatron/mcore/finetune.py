"""Train a part of the model only: the routed experts of a module, alone or inside the full model.

`--train-only experts` freezes everything else before Megatron wraps the model, so that frozen weights get no gradient,
no optimizer state and no weight decay. With `--train-selection` only the experts of a Selection are trained.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from emo_megatron.checkpoint.reader import MegatronCheckpoint, facts_of
from emo_megatron.experts.selection import Selection, load_selection
from emo_megatron.mcore.source import check_routers_when_started, loaded_by_megatron

# the experts of the local layers, and of Transformer Engine's
_EXPERT = re.compile(r"local_experts\.(\d+)\..+|linear_fc[12]\.(?:weight|bias)(\d+)")

TrainOnly = Literal["experts", "experts+router", "all"]


def add_finetune_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Flags that say which weights are trained."""
    group = parser.add_argument_group("fine-tuning a module")
    group.add_argument(
        "--train-only",
        choices=get_args(TrainOnly),
        default="all",
        help="Routed experts, also the router, or everything. What is frozen gets no gradient and no weight decay.",
    )
    group.add_argument(
        "--train-selection",
        type=Path,
        metavar="FILE",
        help="With --train-only experts and --no-save-optim: of the experts only those of this Selection, made of the "
        "model in --load.",
    )
    return parser


def freeze_hook(args: argparse.Namespace) -> Callable[[list[Any]], list[Any]] | None:
    """What Megatron calls with the model's chunks before it wraps them; None where everything is trained.

    Args:
        args: Megatron's parsed flags with those of `add_finetune_args`.

    Raises:
        ValueError: the flags do not go together, or the Selection is of another model.
    """
    policy: TrainOnly = args.train_only
    selection = source = None
    if args.train_selection is not None:
        if policy != "experts":
            raise ValueError(
                f"--train-selection needs --train-only experts; got {policy}: the other weights have no experts of "
                "their own"
            )
        if args.mtp_num_layers:
            raise ValueError(
                "--train-selection cannot go with --mtp-num-layers: a Selection names experts of the decoder's layers "
                f"alone; got {args.mtp_num_layers}"
            )
        if not args.no_save_optim:
            raise ValueError(
                "--train-selection needs --no-save-optim: Megatron stores the optimizer's state of all experts of a "
                "layer or of none"
            )
        if getattr(args, "expert_placement", None) is not None:
            raise ValueError(
                "--train-selection cannot go with --expert-placement: experts are chosen before they change places. "
                "Put them in place with `relabel` first, and choose of its checkpoint"
            )
        selection = load_selection(args.train_selection)
        if selection.num_experts != args.num_experts:
            raise ValueError(
                f"--train-selection {args.train_selection} is of a model of {selection.num_experts} experts, and "
                f"--num-experts is {args.num_experts}"
            )
        source = loaded_by_megatron(args)
        _check_model(selection, source, file=args.train_selection)
    if policy == "all":
        return None

    def hook(chunks: list[Any]) -> list[Any]:
        num_trained = sum(freeze(chunk, policy=policy, selection=selection) for chunk in chunks)
        if source is not None:
            for chunk in chunks:
                check_routers_when_started(chunk, source)
        if _over_stage(num_trained) == 0:
            raise ValueError(
                f"--train-only {policy} leaves this pipeline stage nothing to train: give every stage an MoE layer"
            )
        return chunks

    return hook


def freeze(model: torch.nn.Module, *, policy: TrainOnly, selection: Selection | None = None) -> int:
    """Freeze all that the policy does not name.

    Args:
        model: a GPTModel, or a pipeline stage's chunk of one, not yet wrapped.
        policy: what stays trainable.
        selection: experts that stay trainable, all if None.

    Returns:
        Parameters (numbers) on this rank that stay trainable.

    Raises:
        ValueError: the Selection does not name the MoE layers of the model, or experts are kept in one parameter.
    """
    if policy == "all":
        return sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        if policy == "experts+router":
            layer.router.requires_grad_(True)
        kept = None if selection is None else _kept(selection, layer)
        for expert, parameter in expert_parameters(layer):
            parameter.requires_grad_(kept is None or expert in kept)
    _keep_graph(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _check_model(selection: Selection, source: MegatronCheckpoint, *, file: Path) -> None:
    """Refuse a Selection that was not made of the weights which the run starts from, or goes on with."""
    facts = facts_of(source)
    try:
        selection.check_model(facts.fingerprint, num_experts=facts.num_experts, layers=facts.layers)
    except ValueError as error:
        raise ValueError(f"--train-selection {file}: {error}") from None


def _over_stage(number: int) -> int:
    """The sum over the ranks of this pipeline stage: one of them may have none of the experts that are trained."""
    if not parallel_state.model_parallel_is_initialized():
        return number
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    total = torch.tensor(number, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def _kept(selection: Selection, layer: MoELayer) -> tuple[int, ...]:
    if layer.layer_number not in selection.layers:
        raise ValueError(
            f"--train-selection names the MoE layers {selection.layers}; the model has one at {layer.layer_number}"
        )
    return selection.experts[selection.layers.index(layer.layer_number)]


def expert_parameters(layer: MoELayer) -> list[tuple[int, Tensor]]:
    """This rank's parameters of routed experts, with the number that each expert has in the whole model."""
    found = []
    for name, parameter in layer.experts.named_parameters():
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise ValueError(f"the experts' weights lie in one parameter ({name}): drop --moe-single-grouped-weight")
        local = int(match[1] or match[2])
        found.append((layer.local_expert_indices[local], parameter))
    return found


def _keep_graph(model: torch.nn.Module) -> None:
    """Let gradients reach the first experts although the embedding is frozen, also through recomputed layers.

    A checkpointed layer none of whose inputs needs a gradient is not differentiated at all.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))
