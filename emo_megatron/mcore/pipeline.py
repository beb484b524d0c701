"""Packed micro-batches of several samples between pipeline stages.

Layers take such a micro-batch flat, as one sequence of hidden states [mbs * s, 1, h], where s is this rank's part of a
sample. Megatron's schedules exchange [s, mbs, h]. The bytes are the same, so a stage only changes the view at its
edges. Shapes need not travel with the tensors then (`variable_seq_lengths`), for which every stage would wait.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, make_viewless_tensor
from megatron.training import get_args
from torch import Tensor


def flatten_received(model: Any, *, num_samples: int) -> None:
    """Give this stage the hidden states it received as its layers take them, before its forward pass.

    Args:
        model: this stage, or virtual stage.
        num_samples: of the packed micro-batch; 1 leaves everything as it is.
    """
    if num_samples == 1:
        return
    decoder = get_attr_wrapped_model(model, "decoder")
    received = decoder.input_tensor
    if received is not None:
        decoder.input_tensor = received.view(-1, 1, received.shape[-1])


def as_exchanged(output: Tensor, model: Any, *, num_samples: int) -> Tensor:
    """A stage's output as Megatron's schedules send it: [s, mbs, h] of [mbs * s, 1, h]; the last stage's as it is."""
    if num_samples == 1 or get_attr_wrapped_model(model, "post_process"):
        return output
    exchanged = output.view(-1, num_samples, output.shape[-1])
    # schedules free what they have sent, which they can't do with a view
    sent: Tensor = make_viewless_tensor(inp=exchanged, requires_grad=exchanged.requires_grad, keep_graph=True)
    return sent


def let_shapes_travel(config: TransformerConfig) -> None:
    """Let the stages of Megatron's own scripts, whose forward step is not ours, send shapes with their tensors."""
    args = get_args()
    is_packed = args.dataloader_inter_document_masking or args.sft
    most_samples = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    if is_packed and args.pipeline_model_parallel_size > 1 and most_samples > 1:
        config.variable_seq_lengths = True
