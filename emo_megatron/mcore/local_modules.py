"""Modules that Megatron's local spec lacks beside attention: norms and projections as Transformer Engine has them.

They take their place in it by spec_rewrite.document_layer. With Transformer Engine none is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TorchNorm:
    """Builds torch's RMSNorm or LayerNorm with Megatron's `sequence_parallel` mark on its parameters.

    The mark makes Megatron sum these gradients over the tensor-parallel ranks, each of which saw its own part of the
    sequence. A class and not a function, because Megatron-Core 0.18 does not call a function it finds in a spec.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """The norm over the last `hidden_size` features; `unused` is what Megatron hands its own norms."""
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "--apply-layernorm-1p needs Transformer Engine or Apex; drop the flag or use "
                "--transformer-impl transformer_engine"
            )
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class NormedLinear(ColumnParallelLinear):
    """Megatron's column-parallel projection of its normed input.

    The norm's parameters are `layer_norm_weight` and, with LayerNorm, `layer_norm_bias`, as in Transformer Engine's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        for name, parameter in TorchNorm(config, input_size).named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ColumnParallelLinear.forward."""
        shape, eps = input_.shape[-1:], self.config.layernorm_epsilon
        if self.config.normalization == "RMSNorm":
            normed = F.rms_norm(input_, shape, self.layer_norm_weight, eps)
        else:
            normed = F.layer_norm(input_, shape, self.layer_norm_weight, self.layer_norm_bias, eps)
        return super().forward(normed, *args, **kwargs)


class AddableRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel projection, to whose output an expert may add its bias.

    Megatron's MLP does so in place, and what one tensor-parallel rank returns is a view that autograd guards.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As RowParallelLinear.forward; the output is a tensor of its own where there is a bias to add."""
        output, bias = super().forward(input_)
        return (output if bias is None else output.clone()), bias
