"""A recipe's ConfigContainer with pools in it."""

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
"""Bridge's provider -> the same with pools."""

OF_POOLS = ("dataset.inter_document_masking", "model.pool_documents")
"""Options that every run with pools sets, strict or not: no recipe chooses them."""


def apply_pools(
    cfg: Any, pool: PoolConfig, *, pool_documents: PoolDocuments = "routers", strict: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Give a pretraining recipe document pools, in place, and print every option that this changes.

    Only what would make pools wrong or has no place for them is changed: balancing of random logits, the router's
    precision, CUDA graphs.

    Args:
        cfg: a recipe's ConfigContainer, not finalized.
        pool: the method. Pools off gives the standard MoE to compare with: the same changes, loader and metrics.
        pool_documents: takes the place of the pool's own, whose default no recipe has. routers: boundaries of documents
            go to the routers alone, and attention, positions and the cut of context parallelism stay the recipe's.
            attention: all of these keep to documents.
        strict: refuse instead of changing an option of the recipe's own.

    Returns:
        Changed option, such as "model.moe_router_dtype" -> (before, after).
    """
    check_run(cfg, pool)
    model = cfg.model
    kind = PROVIDERS.get(type(model), type(model) if isinstance(model, Pooled) else None)
    if kind is None:
        raise ValueError(
            f"cfg.model must be one of {', '.join(sorted(cls.__name__ for cls in PROVIDERS))}; got "
            f"{type(model).__name__}, which may build layers of its own that would see no pools"
        )
    changes = _changes(cfg, pool, pool_documents)
    of_recipe = {name: both for name, both in changes.items() if name not in OF_POOLS}
    if strict and of_recipe:
        raise ValueError(
            "a strict run changes nothing of a recipe; these options must be set first:\n"
            + "\n".join(f"  - {n} must be {new!r}; got {old!r}" for n, (old, new) in of_recipe.items())
        )
    fields = {name: getattr(pool, name) for name in POOL_FIELDS}
    fields |= {name.removeprefix("model."): new for name, (_, new) in changes.items() if name.startswith("model.")}
    tried = copy.copy(model)
    # a recipe that is refused stays as it was
    tried.__class__ = kind
    vars(tried).update(fields)
    require_possible(tried)
    # the step checks what was loaded, after minutes of many ranks
    check_resume(cfg.checkpoint, tried.pool_config(), step=step_to_load(cfg.checkpoint))
    model.__class__ = kind
    vars(model).update(fields)
    cfg.dataset.inter_document_masking = True
    if is_first_rank():
        for name, (old, new) in changes.items():
            print(f"emo_megatron: {name}: {old!r} -> {new!r}", flush=True)
    return changes


def is_first_rank() -> bool:
    """Whether this is the process that speaks for all, also before and after there are process groups."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def check_run(cfg: Any, pool: PoolConfig) -> None:
    """Refuse data and training options of a recipe that pools would be wrong with."""
    dataset = cfg.dataset
    if type(dataset) not in (GPTDatasetConfig, MockGPTDatasetConfig):
        raise ValueError(
            f"cfg.dataset must be a GPTDatasetConfig or MockGPTDatasetConfig; got {type(dataset).__name__}: pools need "
            "the document boundaries of pretraining text. Use a pretraining recipe on text"
        )
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(dataset, name):
            raise ValueError(
                f"dataset.{name} must be False; got True: Bridge's boundaries of documents would replace what it does"
            )
    skipped = cfg.train.iterations_to_skip
    if skipped and cfg.model.pipeline_model_parallel_size > 2:
        raise ValueError(
            f"train.iterations_to_skip must be empty with model.pipeline_model_parallel_size above 2; got {skipped}: "
            "Bridge skips the batches of the first and the last stage only, and the routers between them would get "
            "the documents of other batches"
        )
    if pool.is_on and dataset.dataloader_type != "single":
        warnings.warn(
            f"dataset.dataloader_type {dataset.dataloader_type}: pool sizes will depend on the number of "
            "data-parallel ranks; with single they do not",
            stacklevel=3,
        )


def _changes(cfg: Any, pool: PoolConfig, pool_documents: PoolDocuments) -> dict[str, tuple[Any, Any]]:
    """Options that must have another value, "section.field" -> (now, then)."""
    wanted: dict[str, Any] = {
        "dataset.inter_document_masking": True,
        "model.pool_documents": pool_documents,
        "model.moe_router_dtype": "fp32",
        "model.moe_router_force_load_balancing": False,
        "model.cuda_graph_impl": "none",
        # Megatron turns graphs on by these, which are deprecated, when it checks the model
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
