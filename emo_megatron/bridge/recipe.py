"""A recipe's ConfigContainer with pools in it."""

from __future__ import annotations

import warnings
from typing import Any

from megatron.bridge.training.config import GPTDatasetConfig, MockGPTDatasetConfig

from emo_megatron.bridge import providers
from emo_megatron.bridge.pooled import POOL_FIELDS, Pooled, require_possible
from emo_megatron.config import PoolConfig

PROVIDERS = {
    cls.__mro__[cls.__mro__.index(Pooled) + 1]: cls
    for cls in vars(providers).values()
    if isinstance(cls, type) and issubclass(cls, Pooled) and cls.__module__ == providers.__name__
}
"""Bridge's provider -> the same with pools."""


def apply_pools(cfg: Any, pool: PoolConfig, *, strict: bool = False) -> dict[str, tuple[Any, Any]]:
    """Give a pretraining recipe document pools, in place, and print every option of its own that this changes.

    Only what would make pools wrong or has no place for them is changed: balancing of random logits, the router's
    precision, CUDA graphs. Boundaries of documents go to the routers alone (`pool_documents` routers), so that
    attention, loader, positions and context parallelism stay the recipe's.

    Args:
        cfg: a recipe's ConfigContainer, not finalized.
        pool: the method. pools off gives the recipe's standard MoE with this package's metrics.
        strict: refuse instead of changing an option.

    Returns:
        Changed option, such as "model.moe_router_dtype" -> (before, after).

    Raises:
        ValueError: the recipe cannot have pools; names the options, and what to write instead.
    """
    _require_text(cfg.dataset)
    model = cfg.model
    kind = PROVIDERS.get(type(model), type(model) if isinstance(model, Pooled) else None)
    if kind is None:
        raise ValueError(
            f"cfg.model must be one of {', '.join(sorted(cls.__name__ for cls in PROVIDERS))}; got "
            f"{type(model).__name__}, which may build layers of its own that would see no pools"
        )
    changes = _changes(cfg, pool)
    if strict and changes:
        raise ValueError(
            "with strict=True a recipe must need no changes; these options must be set first:\n"
            + "\n".join(
                f"  - {n} must be {new!r}; got {old!r}" for n, (old, new) in changes.items()
            )
        )
    model.__class__ = kind
    for name in POOL_FIELDS:
        setattr(model, name, getattr(pool, name))
    for name, (_, new) in changes.items():
        section, _, field = name.partition(".")
        setattr(getattr(cfg, section), field, new)
    require_possible(model)
    for name, (old, new) in changes.items():
        print(f"emo_megatron: {name}: {old!r} -> {new!r}", flush=True)
    if pool.is_on and cfg.dataset.dataloader_type != "single":
        warnings.warn(
            f"dataset.dataloader_type {cfg.dataset.dataloader_type}: pool sizes will depend on the number of "
            "data-parallel ranks; with single they do not",
            stacklevel=2,
        )
    return changes


def _require_text(dataset: Any) -> None:
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


def _changes(cfg: Any, pool: PoolConfig) -> dict[str, tuple[Any, Any]]:
    """Options that must have another value, "section.field" -> (now, then)."""
    wanted: dict[str, Any] = {"dataset.inter_document_masking": True}
    if pool.is_on:
        wanted |= {
            "model.pool_documents": "routers",
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
