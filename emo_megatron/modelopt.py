"""Pruning by NVIDIA ModelOpt (`mcore_minitron`) that keeps exactly the experts of a Selection, in a model in memory.

ModelOpt ranks experts by a score of its own. `prune_experts` gives ModelOpt the ranking of a Selection instead, and
checks the result. This module needs nvidia-modelopt and Transformer Engine, which ModelOpt imports for pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from emo_megatron.checkpoint.names import is_of_experts, split_name
from emo_megatron.config import WITHOUT_POOLS, PoolConfig
from emo_megatron.experts.selection import Selection, router_fingerprint
from emo_megatron.mcore.dispatcher import PoolAlltoAllDispatcher, follow_routing_map
from emo_megatron.mcore.layer import PoolMoELayer
from emo_megatron.mcore.reruns import follow_reruns
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.runners.base import digest_of
from emo_megatron.runners.megatron_hooks import model_weights

try:
    import modelopt.torch.prune as mtp
    from modelopt.torch.nas.plugins.megatron import SUPPORTED_MODELS, _DynamicMoELayer
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config
except ImportError as error:
    raise ImportError(
        f"emo_megatron.modelopt needs nvidia-modelopt 0.47 and Transformer Engine; {error}: see docs/modules.md, "
        "section ModelOpt"
    ) from error


@DMRegistry.register({PoolMoELayer: "emo_megatron.mcore.layer.PoolMoELayer"})
class _DynamicPoolMoELayer(_DynamicMoELayer):
    """ModelOpt's MoE layer for PoolMoELayer, which ModelOpt does not recognise because the class has its own forward.

    The other classes of this package keep Megatron's `forward` and need no registration.
    """

    token_dispatcher: Any

    def _export_reinit_token_dispatcher(self) -> None:
        # ModelOpt makes a new dispatcher; PoolMoELayer.__init__ adapts the first one in the same way
        if isinstance(self.token_dispatcher, PoolAlltoAllDispatcher):
            self.config.num_moe_experts = self.num_moe_experts
            self.token_dispatcher = PoolAlltoAllDispatcher(
                self.num_local_experts, config=self.config, pg_collection=get_default_pg_collection()
            )
            self._token_dispatcher_reinitialized = True
            return
        super()._export_reinit_token_dispatcher()
        follow_routing_map(self.token_dispatcher, self.config)
        follow_reruns(self.token_dispatcher, self.pool_router)


def prune_experts(
    model: torch.nn.Module, selection: Selection, *, forward_loop: Callable[[Any], None] | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """`modelopt.torch.prune.prune` with `mcore_minitron`, which keeps the experts of the Selection and nothing else.

    ModelOpt stores experts in descending order of their scores. The scores given here keep the kept experts ascending,
    so that the result equals the module that `extract` writes, with the same order of experts. As in that module, pools
    and groups of experts are off afterwards.

    Args:
        model: a GPTModel or HybridModel of Megatron, without wrappers. ModelOpt changes the model in place.
        selection: made from this model; keeps equally many experts in every layer.
        forward_loop: runs the model on calibration data. None: no data, because experts need none. ModelOpt's scores of
            layers, which the result does not depend on, are then constant.

    Returns:
        The pruned model, and ModelOpt's state of the search.

    Raises:
        ValueError: the Selection is of another model, or the model cannot be pruned to its experts.
        NotImplementedError: the model has a parallel layout or layers that are not pruned here.
        RuntimeError: the pruned model does not hold exactly the experts of the Selection.
    """
    layers = {int(m.layer_number): m for m in model.modules() if isinstance(m, MoELayer)}
    num_kept = _check(model, selection, layers)
    parents = {number: layer.router.weight.detach().clone() for number, layer in layers.items()}
    before = _expert_digests(model)

    def rank(converted: Any) -> None:
        if forward_loop is not None:
            forward_loop(converted)
        else:
            for layer in converted.decoder.layers:
                # ModelOpt requires a score above 0, and uses the scores only to remove layers
                layer._scores = 1.0
        for number, layer in layers.items():
            layer.experts._activations["expert_l2_scores"] = _scores(selection, number)
            layer.experts._activations["expert_sample_counts"] = torch.ones(selection.num_experts)

    pruned, state = mtp.prune(
        model,
        mode=[("mcore_minitron", get_mcore_minitron_config(num_moe_experts_divisor=1))],
        constraints={"export_config": {"num_moe_experts": num_kept}},
        dummy_input=None,
        config={"forward_loop": rank},
    )
    for layer in layers.values():
        _finish(layer, num_kept)
    _check_result(pruned, selection, layers=layers, parents=parents, before=before)
    return pruned, state


def _scores(selection: Selection, number: int) -> Tensor:
    """[E] float32: the kept experts first, and each part ascending in the order of the experts."""
    scores_E = torch.arange(selection.num_experts, 0, -1, dtype=torch.float32)
    scores_E[list(selection.by_layer[number])] += selection.num_experts
    return scores_E


def _check(model: torch.nn.Module, selection: Selection, layers: dict[int, MoELayer]) -> int:
    """The number of experts that every layer keeps; an error if ModelOpt cannot prune the model to the Selection."""
    if not isinstance(model, tuple(SUPPORTED_MODELS)):
        raise ValueError(f"the model must be a GPTModel or HybridModel without wrappers; got {type(model).__name__}")
    config: Any = model.config
    num_kept = selection.uniform_count(purpose="pruning with ModelOpt")
    if num_kept < config.moe_router_topk:
        raise ValueError(
            f"every layer must keep at least moe_router_topk {config.moe_router_topk} experts; the Selection keeps "
            f"{num_kept}: select again with --keep"
        )
    for kind in ("tensor_model", "expert_model", "context", "pipeline_model"):
        # ModelOpt prunes pipelines too, but a stage has a part of the routers, and the fingerprint is of all
        if (size := getattr(config, f"{kind}_parallel_size")) > 1:
            raise NotImplementedError(
                f"prune_experts needs a model with {kind}_parallel_size 1; got {size}: load the model in one process"
            )
    if config.mtp_num_layers:
        raise NotImplementedError(
            f"ModelOpt prunes no layers of multi-token prediction; got mtp_num_layers {config.mtp_num_layers}"
        )
    fingerprint = router_fingerprint(layers[number].router.weight for number in sorted(layers))
    selection.check_model(fingerprint, num_experts=config.num_moe_experts, layers=sorted(layers))
    return num_kept


def _finish(layer: MoELayer, num_kept: int) -> None:
    """Set what ModelOpt leaves at the parent's number of experts, and turn pools and groups off."""
    layer.local_expert_indices = list(range(num_kept))
    router, config = layer.router, layer.config
    if router.global_tokens_per_expert is not None:
        router.global_tokens_per_expert = router.global_tokens_per_expert.new_zeros(num_kept)
    config.moe_router_num_groups = config.moe_router_group_topk = None
    if isinstance(router, PoolRouter):
        router.pool = PoolConfig(**{name: getattr(router.pool, name) for name in WITHOUT_POOLS})


def _expert_digests(model: torch.nn.Module) -> dict[tuple[str, int], str]:
    """(Name, expert) -> hash of the expert's part of a weight: rows of routers included."""
    found: dict[tuple[str, int], str] = {}
    for name, _, experts, weight in model_weights(model):
        if not is_of_experts(name):
            continue
        parts = {experts: weight} if isinstance(experts, int) else dict(zip(experts, weight, strict=True))
        found |= {(name, expert): digest_of([("", part)]) for expert, part in parts.items()}
    return found


def _check_result(
    pruned: torch.nn.Module,
    selection: Selection,
    *,
    layers: dict[int, MoELayer],
    parents: dict[int, Tensor],
    before: dict[tuple[str, int], str],
) -> None:
    """Raise RuntimeError if a layer does not hold the kept experts of the parent, bit for bit and in this order."""
    wrong = [
        number
        for number, layer in layers.items()
        if not torch.equal(layer.router.weight, parents[number][list(selection.by_layer[number])])
    ]
    after = _expert_digests(pruned)
    config: Any = pruned.config
    layer_of = {name: split_name(name, num_layers=config.num_layers)[0] for name, _ in after}
    wrong += [
        layer_of[name]
        for (name, expert), digest in after.items()
        if digest != before[name, selection.by_layer[layer_of[name]][expert]]
    ]
    num_kept = sum(len(selection.by_layer[layer]) for layer in layer_of.values())
    if wrong or len(after) != num_kept:
        raise RuntimeError(
            f"ModelOpt did not keep the experts of the Selection in the layers {sorted(set(wrong))}: do not use this "
            "model, and report the version of nvidia-modelopt"
        )
