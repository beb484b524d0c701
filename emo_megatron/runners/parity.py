"""Compare an exported model with a Megatron checkpoint: the logits of both on the same random tokens, in float32.

Megatron's model is built from stock layers with the flags in the checkpoint, and Megatron's own reader loads the
weights: the comparison shares only the checkpoint with the export. The comparison runs in this process and switches
this process's Megatron to the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from emo_megatron.checkpoint.model_flags import megatron_parser, model_flags
from emo_megatron.checkpoint.names import is_of_experts
from emo_megatron.checkpoint.reader import MegatronCheckpoint
from emo_megatron.finite import NotFiniteError, check_weight, first_bad
from emo_megatron.hf.folder import StoredModel, as_stock
from emo_megatron.hf.mapping import FUSED_NORM, OWN_NORM, weight_shapes
from emo_megatron.mcore import cpu
from emo_megatron.runners.loading import megatron_errors
from emo_megatron.variables import as_no_other_job

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
TOLERANCES = {torch.float32: 1e-4}
"""Largest difference, relative to the largest logit, by the dtype of the stored model: the order of sums may differ."""
ROUNDED_TOLERANCE = 1e-2
"""The same for other dtypes, where rounding may also make a token choose another expert of nearly equal score."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Difference between the exported model and Megatron's model, on the same random tokens in float32."""

    tokens: int
    max_difference: float
    """Largest difference between the logits of the two models."""
    max_logit: float
    """Largest absolute logit, for comparison."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.max_difference:.1e} over {self.tokens} tokens "
            f"(largest logit {self.max_logit:.3g})"
        )


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Result of an export or an import."""

    path: Path
    parity: Parity | None
    """None if not measured."""
    has_tokenizer: bool
    """Whether a tokenizer was found and is part of the result."""
    remark: str | None = None
    """A line about the result that the user should know."""

    def __str__(self) -> str:
        lines = [str(self.path)]
        if self.parity is not None:
            lines.append(f"parity with Megatron: {self.parity}")
        if not self.has_tokenizer:
            lines.append("no tokenizer: found no Hugging Face tokenizer; pass its folder with --tokenizer")
        if self.remark:
            lines.append(self.remark)
        return "\n".join(lines)


def measure_parity(checkpoint: MegatronCheckpoint, model: StoredModel, *, tokens: int) -> Parity:
    """Measure the difference between both models' logits on one sequence of random tokens.

    The checkpoint's weights are first rounded to the dtype of `model`, so that only the conversion is measured.

    Raises:
        NotFiniteError: a logit is not finite; names a weight that is not finite, if there is one.
        RuntimeError: logits differ by more than the tolerance.
    """
    tokens = min(tokens, model.architecture.max_positions)
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(model.architecture.vocab_size, (tokens,), generator=generator)
    # one model in memory at a time
    expected_TV = megatron_logits(checkpoint, tokens_T, rounded_to=model.dtype)
    found_TV = hugging_face_logits(model, tokens_T)
    for which, logits_TV in ((checkpoint.path, expected_TV), (model.path, found_TV)):
        if first_bad(logits_TV) is not None:
            _check_weights(checkpoint, model)
            raise NotFiniteError(
                f"the model in {which} has finite weights but logits that are not finite: the logits are too large for "
                "float32, so the two models cannot be compared"
            )
    parity = Parity(
        tokens=tokens,
        max_difference=float((expected_TV - found_TV).abs().max()),
        max_logit=float(expected_TV.abs().max()),
    )
    # this form of the condition is also true for a difference that is NaN
    tolerance = TOLERANCES.get(model.dtype, ROUNDED_TOLERANCE)
    if not parity.max_difference <= tolerance * max(1.0, parity.max_logit):
        raise RuntimeError(f"the Megatron checkpoint and {model.path} are not the same model: {parity}")
    return parity


def _check_weights(checkpoint: MegatronCheckpoint, model: StoredModel) -> None:
    """Raise NotFiniteError if a weight of the checkpoint or of the stored model is not finite."""
    for name, info in checkpoint.names.items():
        experts = range(info.shape[0]) if is_of_experts(name) else ()
        layer = checkpoint.layer_of(name) or None
        check_weight(name, checkpoint.read(name), layer=layer, experts=experts)
    for name in weight_shapes(model.architecture):
        model.weight(name)


@torch.no_grad()
def hugging_face_logits(stored: StoredModel, tokens_T: Tensor) -> Tensor:
    """[T, V] float32 logits of a stored model; every format runs as Qwen2-MoE, without remote code."""
    from transformers import Qwen2MoeForCausalLM

    with as_stock(stored, dtype=torch.float32, under=stored.path.parent) as path:
        model: Any = Qwen2MoeForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        ).eval()
        logits_TV: Tensor = model(tokens_T[None]).logits[0]
    return logits_TV.float()


@torch.no_grad()
def megatron_logits(
    checkpoint: MegatronCheckpoint, tokens_T: Tensor, *, rounded_to: torch.dtype = torch.float32
) -> Tensor:
    """[T, V] float32 logits of a checkpoint's model with Megatron's own layers and weights rounded to a dtype."""
    length = tokens_T.numel()
    with as_no_other_job(), _one_process():
        model = _model(checkpoint)
        for parameter in model.parameters():
            parameter.copy_(parameter.to(rounded_to))
        is_masked = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        logits_TV: Tensor = model(tokens_T[None], torch.arange(length)[None], is_masked)[0]
    return logits_TV.float()


@megatron_errors("the model whose logits are compared (--parity-tokens 0 compares none)")
def _model(checkpoint: MegatronCheckpoint) -> torch.nn.Module:
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = _plain_args(checkpoint)
    config = core_transformer_config_from_args(args)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization
        ),
        vocab_size=checkpoint.names["embedding.word_embeddings.weight"].shape[0],
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    ).eval()
    _load(model, checkpoint)
    return model


def _plain_args(checkpoint: MegatronCheckpoint) -> argparse.Namespace:
    """Flags for the model in one process, in float32 and plain PyTorch, with the model's flags from the checkpoint."""
    parser = megatron_parser()
    args = parser.parse_args([])
    plain = {
        "params_dtype": torch.float32,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "moe_token_dispatcher_type": "alltoall",
        "no_persist_layer_norm": True,
    }
    fusions = ("masked_softmax", "bias_gelu", "bias_swiglu", "bias_dropout", "apply_rope", "gradient_accumulation")
    plain |= {f"{name}_fusion": False for name in fusions}
    # only logits of the next token are compared, which layers of multi-token prediction do not change
    main = {"mtp_num_layers": None, "mtp_use_repeated_layer": False}
    for name, value in (plain | model_flags(checkpoint, parser) | main).items():
        setattr(args, name, value)
    return args


def _load(model: Any, checkpoint: MegatronCheckpoint) -> None:
    """Load a checkpoint with Megatron's own reader, also a checkpoint with names of Transformer Engine's layers."""
    metadata = dist_checkpointing.load_content_metadata(str(checkpoint.path)) or {}
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
    wanted = {}
    for name, tensor in state.items():
        if "_extra_state" in name:
            continue
        key = getattr(tensor, "key", "")
        if key.endswith(FUSED_NORM):
            own = key.removesuffix(FUSED_NORM) + OWN_NORM
            # layers of equal shape are stacked in one tensor, whose name has no layer number
            if own.replace("decoder.layers.pre", "decoder.layers.0.pre") in checkpoint.names:
                tensor.key = own
        wanted[name] = tensor
    loaded = dist_checkpointing.load(wanted, str(checkpoint.path))
    missing, _ = model.load_state_dict(loaded, strict=False)
    assert all("_extra_state" in name for name in missing), missing


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Create Megatron's process groups for this process alone, and destroy them afterwards."""
    os.environ["EMO_DEVICE"] = "cpu"
    cpu.activate()
    # Megatron passes the attention backend in these variables, and raises if a later model has another backend
    chosen = {name: os.environ.pop(name, None) for name in ATTENTION_VARIABLES}
    starts_here = not dist.is_initialized()
    if starts_here:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if starts_here:
            dist.destroy_process_group()
        for name, value in chosen.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
