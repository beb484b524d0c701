"""Multi-token prediction losses divided by the main loss's number of tokens, so that every layout gives equal losses.

Megatron divides a depth's loss by the loss-counted tokens of that depth in each rank's micro-batch. Ranks have
different numbers of these tokens, so Megatron's loss depends on how ranks split the tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_model
from megatron.core.models.hybrid import hybrid_model
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper, roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

_CALLERS: tuple[Any, ...] = (gpt_model, hybrid_model)
_HOST_LOSS = multi_token_prediction.process_mtp_loss
_IN_0_18 = {
    *("hidden_states", "labels", "loss_mask", "output_layer", "output_weight"),
    *("runtime_gather_output", "is_training", "compute_language_model_loss", "config"),
    *("cp_group", "packed_seq_params", "scale_logits_fn"),
}
_IN_0_19 = _IN_0_18 | {"tp_group", "input_ids"}


def use_exact_mtp_loss(is_exact: bool = True) -> None:
    """Make Megatron's models use `exact_mtp_loss`, or Megatron's own function again (`is_exact` False)."""
    found = set(inspect.signature(_HOST_LOSS).parameters)
    if not _IN_0_18 <= found <= _IN_0_19:
        raise ValueError(
            "--mtp-exact-loss must be left out with this Megatron-Core: its process_mtp_loss must take "
            f"{sorted(_IN_0_19)}; got {sorted(found)}"
        )
    for module in _CALLERS:
        if not hasattr(module, "process_mtp_loss"):
            raise ValueError(
                f"--mtp-exact-loss must be left out with this Megatron-Core: {module.__name__} must call "
                "process_mtp_loss; got a module without it"
            )
        module.process_mtp_loss = exact_mtp_loss if is_exact else _HOST_LOSS


def exact_mtp_loss(
    *,
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    is_training: bool,
    config: TransformerConfig,
    cp_group: dist.ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    **head: Any,
) -> Tensor:
    """Megatron's process_mtp_loss with another divisor: a token of a depth has the weight of a token of the main loss.

    With --calculate-per-token-loss Megatron divides gradients by the main loss's tokens of the step, and the loss of a
    depth is a plain sum. Without the flag, the sum is divided by the main loss's tokens of the micro-batch on all
    context-parallel ranks, so that Megatron's mean over these ranks is the mean over the micro-batch.

    Args:
        hidden_states: [(1 + depths) * s, b, h], of the decoder and of every depth.
        labels: [b, s] of the main loss; None: Megatron's own function is called.
        loss_mask: [b, s], the tokens that the main loss counts; None: all tokens.
        is_training: whether losses are logged: for each depth the mean over all ranks' counted tokens of the depth.
        packed_seq_params: the documents, whose boundaries the rolls do not cross.
        head: the other arguments of Megatron's function, which turn hidden states into losses.

    Returns:
        [s, b, h], the decoder's hidden states; their backward adds the gradients of the losses.
    """
    rolls = {"cp_group": cp_group, "packed_seq_params": packed_seq_params}
    if labels is None:
        head |= rolls | {"loss_mask": loss_mask, "is_training": is_training, "config": config}
        return _HOST_LOSS(hidden_states=hidden_states, labels=None, **head)
    if loss_mask is None:
        loss_mask = torch.ones_like(labels)
    scale = _scale(loss_mask.sum(), config, cp_group)
    targets, counts_K = _targets(labels, loss_mask, num_depths=config.mtp_num_layers, **rolls)
    log = _Log(counts_K, head) if is_training else None
    hidden, *of_depths = torch.chunk(hidden_states, 1 + len(targets), dim=0)
    weight = _output_weight(config, head["output_layer"], head["output_weight"])
    for idx, (labels, loss_mask) in enumerate(targets):
        logits, _ = head["output_layer"](
            of_depths[idx], weight=weight, runtime_gather_output=head["runtime_gather_output"]
        )
        if head.get("scale_logits_fn") is not None:
            logits = head["scale_logits_fn"](logits)
        loss = loss_mask * head["compute_language_model_loss"](labels, logits)
        if log is not None:
            log.save(idx, loss, logits, labels, loss_mask)
        hidden = MTPLossAutoScaler.apply(hidden, scale * loss)
    return hidden


def _targets(
    labels: Tensor, loss_mask: Tensor, *, num_depths: int, **rolls: Any
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Labels and mask [b, s] of each depth, and the number of this rank's counted tokens per depth, [depths]."""
    targets, counts = [], []
    for _ in range(num_depths):
        labels, _ = roll_tensor(labels, **rolls)
        loss_mask, num_tokens = roll_tensor(loss_mask, **rolls)
        targets.append((labels, loss_mask))
        counts.append(num_tokens)
    return targets, torch.stack(counts)


def _scale(num_tokens: Tensor, config: TransformerConfig, cp_group: dist.ProcessGroup | None) -> Tensor | float:
    """The factor of a depth's summed loss; `num_tokens`, [], is this rank's number of tokens in the main loss."""
    scale = config.mtp_loss_scaling_factor / config.mtp_num_layers
    if config.calculate_per_token_loss:
        return scale
    cp_size = 1 if cp_group is None else cp_group.size()
    if cp_size > 1:
        dist.all_reduce(num_tokens, group=cp_group)
    return scale * cp_size / num_tokens.clamp(min=1)


def _output_weight(config: Any, output_layer: Any, output_weight: Tensor | None) -> Tensor | None:
    """The output layer's weight for depth losses; None: the layer's own weight.

    With mtp_detach_heads the weight gets no gradient from depth losses. Megatron-Core 0.18 lacks that option.
    """
    if not getattr(config, "mtp_detach_heads", False):
        return output_weight
    return (output_layer.weight if output_weight is None else output_weight).detach()


class _Log:
    """Logs a micro-batch's losses in Megatron, which averages the values of all data- and context-parallel ranks.

    Args:
        counts_K: [depths], this rank's counted tokens of each depth.
        head: as in `exact_mtp_loss`.
    """

    def __init__(self, counts_K: Tensor, head: dict[str, Any]) -> None:
        self._group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        # float64, because float32 represents integers exactly only up to 2^24
        self._counts_K = counts_K.double()
        dist.all_reduce(self._counts_K, group=self._group)
        self._head = head

    def save(self, depth_idx: int, loss: Tensor, logits: Tensor, labels: Tensor, loss_mask: Tensor) -> None:
        """Log one depth's losses [b, s], scaled so that Megatron's average over ranks is the mean over all tokens."""
        share = self._group.size() / self._counts_K[depth_idx].clamp(min=1)
        saved = (loss.detach().sum() * share).float()
        num_layers = len(self._counts_K)
        if hasattr(MTPLossLoggingHelper, "save_loss_to_tracker"):
            # Megatron-Core 0.18 does not log the acceptance rate
            MTPLossLoggingHelper.save_loss_to_tracker(saved, depth_idx, num_layers, avg_group=self._group)
            return
        head = self._head
        correct, total = multi_token_prediction._compute_mtp_acceptance_counts(
            logits, labels, loss_mask, head["output_layer"], head["runtime_gather_output"], head.get("tp_group")
        )
        MTPLossLoggingHelper.save_metrics_to_tracker(
            saved, correct, total, depth_idx, num_layers, avg_group=self._group
        )
