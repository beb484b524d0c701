"""Megatron without Transformer Engine: norms and projections that the local spec lacks, and HybridModel's stack.

`spec_rewrite.document_layer` puts these modules into a spec. With Transformer Engine none of these modules is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor


class TorchNorm:
    """Builds torch's RMSNorm or LayerNorm with Megatron's `sequence_parallel` mark on its parameters.

    The mark makes Megatron sum the gradients over the tensor-parallel ranks, because each rank has one part of the
    sequence. TorchNorm is a class because Megatron-Core 0.18 does not call functions in a spec.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """The norm over the last dimension; `unused` are further arguments that Megatron gives its norms."""
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
    """Megatron's column-parallel projection with a norm of the input.

    As in Transformer Engine, the norm's parameters are `layer_norm_weight` and, with LayerNorm, `layer_norm_bias`.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        for name, parameter in TorchNorm(config, input_size).named_parameters():
            self.register_parameter(f"layer_norm_{name}", parameter)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """ColumnParallelLinear.forward of the normed input."""
        shape, eps = input_.shape[-1:], self.config.layernorm_epsilon
        if self.config.normalization == "RMSNorm":
            normed = F.rms_norm(input_, shape, self.layer_norm_weight, eps)
        else:
            normed = F.layer_norm(input_, shape, self.layer_norm_weight, self.layer_norm_bias, eps)
        return super().forward(normed, *args, **kwargs)


class AddableRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel projection with an output that an expert can add a bias to in place.

    Megatron's MLP adds the bias in place. With one tensor-parallel rank Megatron's output is a view, which autograd
    does not allow to be changed in place.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """RowParallelLinear.forward; if there is a bias, the output is a copy and not a view."""
        output, bias = super().forward(input_)
        return (output if bias is None else output.clone()), bias


class LocalHybridStack(HybridStack):
    """Megatron's hybrid stack with torch's final norm instead of Transformer Engine's."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = TorchNorm(self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon)


class _NeedsTransformerEngine:
    """For layers that the local stack lacks: raises, where Megatron would silently build a layer that does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "without Transformer Engine --hybrid-layer-pattern must have only attention (*), MLP (-) and MoE (E) "
            "layers; use --transformer-impl transformer_engine"
        )


def local_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """A stack of attention, MLP and MoE layers, each made from one half of a local GPT layer."""
    sparse, dense = (
        get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
        )
        for num_experts in (config.num_moe_experts, None)
    )
    halves = sparse.submodules
    attention = dataclasses.replace(
        sparse,
        submodules=TransformerLayerSubmodules(
            input_layernorm=halves.input_layernorm,
            self_attention=halves.self_attention,
            self_attn_bda=halves.self_attn_bda,
            sharded_state_dict_keys_map=halves.sharded_state_dict_keys_map,
        ),
    )
    moe, mlp = (
        dataclasses.replace(
            layer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=layer.submodules.pre_mlp_layernorm,
                mlp=layer.submodules.mlp,
                mlp_bda=layer.submodules.mlp_bda,
            ),
        )
        for layer in (sparse, dense)
    )
    layers = {
        field.name: _NeedsTransformerEngine
        for field in dataclasses.fields(HybridStackSubmodules)
        if field.name.endswith("_layer")
    }
    layers |= {"attention_layer": attention, "mlp_layer": mlp, "moe_layer": moe}
    # None: in a hybrid model multi-token prediction builds a stack of decoder layers, and needs no own layer spec
    prediction = get_mtp_layer_spec_for_backend(None, backend=LocalSpecProvider())
    mtp_block = ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[prediction])
    )
    submodules = HybridStackSubmodules(**layers, mtp_block_spec=mtp_block)
    return ModuleSpec(module=LocalHybridStack, submodules=submodules)
