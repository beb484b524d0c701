"""apply_pools: add document pools to the ConfigContainer of a recipe."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

from megatron.bridge.training.config import GPTDatasetConfig, MockGPTDatasetConfig

from emo_megatron.bridge import providers
from emo_megatron.bridge.pooled import POOL_FIELDS, Pooled, require_possible
from emo_megatron.bridge.run_config import check_resume, step_to_load
from emo_megatron.config import PoolConfig, PoolDocuments

PROVIDERS = {
    cls.__mro__[cls.__mro__.index(Pooled) + 1]: cls
    for cls in vars(providers).values()
    if isinstance(cls, type) and issubclass(cls, Pooled) and cls.__module__ == providers.__name__
}
"""Bridge's provider -> that provider with pools."""

OF_POOLS = ("dataset.inter_document_masking", "model.pool_documents")
"""Options that every run with pools sets, strict or not, because recipes do not set them."""


def apply_pools(
    cfg: Any, pool: PoolConfig, *, pool_documents: PoolDocuments = "routers", strict: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Add document pools to a pretraining recipe, in place, and print every changed option.

    Only options that are wrong or unsupported with pools change: load balancing of random logits, the router's
    precision, CUDA graphs.

    Args:
        cfg: a recipe's ConfigContainer, not finalized.
        pool: the pools. With pools off, the run is the standard MoE as a baseline: same changes, loader and metrics.
        pool_documents: replaces `pool.pool_documents`, whose default does not match recipes. routers: only the routers
            get document boundaries; attention, positions and the context-parallel split stay as in the recipe.
            attention: all of these respect document boundaries.
        strict: raise instead of changing an option of the recipe.

    Returns:
        Changed option, such as "model.moe_router_dtype" -> (before, after).
    """
    check_run(cfg, pool)
    model = cfg.model
    kind = PROVIDERS.get(type(model), type(model) if isinstance(model, Pooled) else None)
    if kind is None:
        raise ValueError(
            f"cfg.model must be one of {', '.join(sorted(cls.__name__ for cls in PROVIDERS))}; got "
            f"{type(model).__name__}, which may build its own layers without pools"
        )
    changes = _changes(cfg, pool, pool_documents)
    of_recipe = {name: both for name, both in changes.items() if name not in OF_POOLS}
    if strict and of_recipe:
        raise ValueError(
            "a strict run does not change options of the recipe; set these options first:\n"
            + "\n".join(f"  - {n} must be {new!r}; got {old!r}" for n, (old, new) in of_recipe.items())
        )
    fields = {name: getattr(pool, name) for name in POOL_FIELDS}
    fields |= {name.removeprefix("model."): new for name, (_, new) in changes.items() if name.startswith("model.")}
    tried = copy.copy(model)
    # checks use a copy, so a recipe that fails them stays unchanged
    tried.__class__ = kind
    vars(tried).update(fields)
    require_possible(tried)
    # an early check: the training step checks the loaded checkpoint only after minutes on many ranks
    check_resume(cfg.checkpoint, tried.pool_config(), step=step_to_load(cfg.checkpoint))
    model.__class__ = kind
    vars(model).update(fields)
    cfg.dataset.inter_document_masking = True
    if is_first_rank():
        for name, (old, new) in changes.items():
            print(f"emo_megatron: {name}: {old!r} -> {new!r}", flush=True)
        if pool.is_on and (advice := _balance_advice(model)):
            print(f"emo_megatron: {advice}", flush=True)
    return changes


def _balance_advice(model: Any) -> str:
    """One line about a balance loss that makes worse modules; empty if the recipe has none."""
    kinds, coefficients = model.moe_router_load_balancing_type, model.moe_aux_loss_coeff
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    is_used = any(coefficients) if isinstance(coefficients, (list, tuple)) else coefficients
    kept = [kind for kind in ("aux_loss", "seq_aux_loss") if kind in kinds]
    if not (kept and is_used) or "global_aux_loss" in kinds:
        return ""
    return (
        f"model.moe_router_load_balancing_type stays {' and '.join(kept)}; for better modules give "
        "model.moe_router_load_balancing_type=global_aux_loss "
        f"model.moe_aux_loss_coeff={0.1 / model.num_layers:.3g} (docs/balance.md)"
    )


def is_first_rank() -> bool:
    """Whether this process prints for all ranks; also valid before and after process groups exist."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def check_run(cfg: Any, pool: PoolConfig) -> None:
    """Raise a ValueError for data and training options of a recipe that pools do not support."""
    dataset = cfg.dataset
    if type(dataset) not in (GPTDatasetConfig, MockGPTDatasetConfig):
        raise ValueError(
            f"cfg.dataset must be a GPTDatasetConfig or MockGPTDatasetConfig; got {type(dataset).__name__}: pools "
            "require the document boundaries of pretraining text. Use a pretraining recipe for text"
        )
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(dataset, name):
            raise ValueError(
                f"dataset.{name} must be False; got True: the option has no effect with Bridge's document boundaries"
            )
    skipped = cfg.train.iterations_to_skip
    if skipped and cfg.model.pipeline_model_parallel_size > 2:
        raise ValueError(
            f"train.iterations_to_skip must be empty with model.pipeline_model_parallel_size above 2; got {skipped}: "
            "Bridge skips batches on the first and the last pipeline stage only, so routers of the other stages would "
            "get the documents of other batches"
        )
    if pool.is_on and dataset.dataloader_type != "single":
        warnings.warn(
            f"dataset.dataloader_type {dataset.dataloader_type}: pool sizes depend on the number of data-parallel "
            "ranks; with dataset.dataloader_type=single they do not",
            stacklevel=3,
        )


def _changes(cfg: Any, pool: PoolConfig, pool_documents: PoolDocuments) -> dict[str, tuple[Any, Any]]:
    """Options that need another value: "section.field" -> (present value, required value)."""
    wanted: dict[str, Any] = {
        "dataset.inter_document_masking": True,
        "model.pool_documents": pool_documents,
        "model.moe_router_dtype": "fp32",
        "model.moe_router_force_load_balancing": False,
        "model.cuda_graph_impl": "none",
        # Megatron's check of the model turns on CUDA graphs if one of these deprecated options is set
        "model.enable_cuda_graph": False,
        "model.external_cuda_graph": False,
    }
    graphs: dict[str, Any] = {"cuda_graph_scope": None, "cuda_graph_modules": []}
    for name, off in graphs.items():
        if "full_iteration" in repr(getattr(cfg.model, name, None)):
            wanted[f"model.{name}"] = off
    now = {
        name: getattr(pool if field in POOL_FIELDS else getattr(cfg, section), field)
        for name in wanted
        for section, _, field in [name.partition(".")]
    }
    return {name: (now[name], new) for name, new in wanted.items() if now[name] != new}
