"""Read weights and MoE statistics from a running Megatron model, in any parallel layout.

Hooks read the router's scores and choice, the outputs of the experts, and the layer's residual change. Hooks replace
nothing in the layer, so the layer's results stay the same, bit for bit.

Shapes: T tokens routed on this rank, E routed experts, R rows computed by this rank's experts, H width of a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from emo_megatron.checkpoint.names import EXPERTS, ROUTER
from emo_megatron.experts.stats import LayerSums, residual_change_of
from emo_megatron.finite import NotFiniteError, check_weight
from emo_megatron.mcore.layer import PoolMoELayer


def check_outputs(config: Any) -> None:
    """Raise NotImplementedError if the norms of expert outputs cannot be measured with this TransformerConfig."""
    if config.expert_tensor_parallel_size > 1:
        raise NotImplementedError(
            "EASY-EP and REAP need complete expert outputs, but expert tensor parallelism sums outputs after the "
            f"experts: use --expert-tensor-parallel-size 1; got {config.expert_tensor_parallel_size}"
        )
    if config.moe_apply_probs_on_input:
        raise NotImplementedError(
            "EASY-EP and REAP need the gate on an expert's output; remove --moe-apply-probs-on-input"
        )


class MoELayerHooks:
    """Hooks that sum statistics of one MoE layer while the model runs, until `remove()`.

    Megatron's experts multiply by the gate before the second projection. The norm of an output row is therefore the
    gate times the norm of the expert's output.

    `sums` are sums over the tokens that this rank counts; exactly one rank counts each token. With `outputs`, expert
    outputs are measured too.
    """

    def __init__(self, layer: PoolMoELayer, *, outputs: bool) -> None:
        router = layer.pool_router
        self.layer = layer
        self.sums = LayerSums(int(layer.config.num_moe_experts), outputs=outputs, device=router.weight.device)
        # without sequence parallelism, all tensor-parallel ranks route the same tokens, and only rank 0 counts them
        self._counts_here = bool(layer.config.sequence_parallel) or parallel_state.get_tensor_model_parallel_rank() == 0
        self._logits_TE: Tensor | None = None
        self._ids_T: Tensor | None = None
        self._routing_map_TE: Tensor | None = None
        self._norms_TE: Tensor | None = None
        router.observe_logits = self._scored
        self._handles = [layer.router.register_forward_hook(self._routed), layer.register_forward_hook(self._finished)]
        if outputs:
            self._handles.append(layer.experts.register_forward_hook(self._computed))

    def remove(self) -> None:
        """Remove the hooks."""
        self.layer.pool_router.observe_logits = None
        for handle in self._handles:
            handle.remove()

    def _scored(self, logits_TE: Tensor, ids_T: Tensor | None) -> None:
        self._logits_TE, self._ids_T = logits_TE, ids_T

    def _routed(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._routing_map_TE = output[1]

    def _computed(self, experts: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        """Return the norm of every row to its token, through the dispatcher that returns the rows themselves."""
        rows_RH, tokens_per_expert = output[0], inputs[1].to(output[0].device)
        num_experts, width = int(self.layer.config.num_moe_experts), rows_RH.shape[1]
        own = torch.tensor(self.layer.local_expert_indices, device=rows_RH.device)
        expert_R = own.repeat_interleave(tokens_per_expert)
        lengths_R = rows_RH.float().norm(dim=1)
        dispatcher = self.layer.token_dispatcher
        returned = []
        # one column per expert, because the dispatcher adds up the rows of a token; as many columns as a row is wide,
        # because the dispatcher is prepared for this width
        for first in range(0, num_experts, width):
            column_R = expert_R - first
            is_inside_R = (column_R >= 0) & (column_R < width)
            spread_RH = torch.zeros_like(rows_RH, dtype=torch.float32)
            spread_RH[is_inside_R, column_R[is_inside_R]] = lengths_R[is_inside_R]
            sent = dispatcher.token_combine(dispatcher.combine_preprocess(spread_RH))
            returned.append(dispatcher.combine_postprocess(sent).reshape(-1, width))
        self._norms_TE = torch.cat(returned, dim=1)[:, :num_experts]

    def _finished(self, layer: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        logits_TE, routing_map_TE = self._logits_TE, self._routing_map_TE
        assert logits_TE is not None
        assert routing_map_TE is not None
        is_counted_T = torch.full_like(logits_TE[:, 0], self._counts_here, dtype=torch.bool)
        if self._ids_T is not None:
            is_counted_T &= self._ids_T >= 0
        change_T = None
        if self._norms_TE is not None:
            change_T = residual_change_of(inputs[0].flatten(0, 1), output[0].flatten(0, 1))
        self.sums.add(
            probs_TE=self._probabilities(logits_TE),
            routing_map_TE=routing_map_TE.bool(),
            is_counted_T=is_counted_T,
            norms_TE=self._norms_TE,
            change_T=change_T,
        )
        self._logits_TE = self._ids_T = self._routing_map_TE = self._norms_TE = None

    def _probabilities(self, logits_TE: Tensor) -> Tensor:
        """The router's scores over all routed experts, normalised to sum to 1."""
        if self.layer.pool_router.score_function == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return logits_TE.softmax(dim=-1)


_LAYER = re.compile(r"(?:decoder\.layers\.\d+|(?P<is_prediction>mtp)\.layers\.\d+\.mtp_model_layer)\.")
_EXPERT = re.compile(
    # names of experts in local layers, in Transformer Engine's layers, and in one grouped parameter
    r"mlp\.experts\.(?:local_experts\.(?P<local>\d+)\.)?(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<grouped>\d*)"
)


def check_weights(model: torch.nn.Module) -> None:
    """Raise NotFiniteError on all ranks if any rank has a weight that is not finite. All ranks must call this."""
    found: str | None = None
    try:
        for name, layer, experts, tensor in model_weights(model):
            check_weight(name, tensor, layer=layer, experts=experts)
    except NotFiniteError as error:
        found = str(error)
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    for said in told:
        if said is not None:
            raise NotFiniteError(said)


def model_weights(model: torch.nn.Module) -> Iterator[tuple[str, int | None, int | Sequence[int], Tensor]]:
    """Parameters and stored buffers of this rank, in the model's order.

    Yields:
        The name, as in `MegatronCheckpoint.names`; the layer, counted from 1, or None outside the layers; the routed
        expert of the weight, or the experts on its first axis, numbered as in the whole model; this rank's part.
    """
    for name, tensor in _stored(model):
        found = _LAYER.match(name)
        if found is None:
            yield name, None, (), tensor
            continue
        layer: Any = model.get_submodule(found[0].removesuffix("."))
        rest, number = name.removeprefix(found[0]), int(layer.layer_number)
        prefix = f"decoder.layers.{number - 1}."
        if found["is_prediction"]:
            prefix = f"mtp.layers.{number - 1}.transformer_layer."
            number += int(layer.config.num_layers)
        experts: int | Sequence[int] = ()
        if expert := _EXPERT.fullmatch(rest):
            rest = EXPERTS + expert["rest"]
            own = list(layer.mlp.local_expert_indices)
            local = expert["local"] or expert["grouped"]
            experts = own[int(local)] if local else own
        elif rest.startswith(ROUTER) and tensor.dim():
            experts = range(len(tensor))
        # with local layers, checkpoints name a norm after the projection that follows the norm
        submodules = getattr(layer, "submodules_config", None)
        for ours, stored in getattr(submodules, "sharded_state_dict_keys_map", {}).items():
            if rest.startswith(ours):
                rest = stored + rest.removeprefix(ours)
        yield f"{prefix}{rest}", number, experts, tensor


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    # buffers that are not stored, such as masks, may contain infinities on purpose
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in passing)
