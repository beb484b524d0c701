"""The command bridge: find a recipe, apply the overrides and the pools, then run Bridge's own training."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from megatron.bridge import perf_recipes, recipes
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

from emo_megatron.arguments import nearest
from emo_megatron.bridge.pooled import in_words_of_bridge
from emo_megatron.bridge.recipe import apply_pools, is_first_rank
from emo_megatron.bridge.step import pool_forward_step
from emo_megatron.config import PoolConfig, pool_config_of

Recipe = Callable[[], Any]

POOL_PREFIX = "model.pool_"
SHARDED_EXPERTS = ("expert_model_parallel_size", "moe")
"""Words in the source of every recipe of an MoE model. Other recipes do not have both."""


def run(recipe: str, overrides: Sequence[str], *, strict: bool) -> str | None:
    """Train a recipe with pools, in a single process or as a rank of torchrun; arguments: see `prepare`.

    Returns:
        Folder of the checkpoints on the first rank; None if there are none, and on all other ranks.
    """
    cfg = prepare(recipe, overrides, strict=strict)
    try:
        pretrain(cfg, pool_forward_step)
    except Exception:
        # the command line prints one line per error, which is too little for a long run on many ranks
        traceback.print_exc()
        raise
    return cfg.checkpoint.save if is_first_rank() else None


def prepare(recipe: str, overrides: Sequence[str], *, strict: bool = False) -> Any:
    """A recipe's ConfigContainer with overrides and pools, checked, for Bridge's pretrain().

    Overrides are applied before pools, so they can change options that pools do not support.

    Args:
        recipe: name of the recipe; see `find_recipe`.
        overrides: fields and values in Hydra's syntax, such as `model.pool_min=8`, `train.train_iters=100`.
        strict: raise instead of changing an option of the recipe.
    """
    pool, others = pools_and_others(overrides)
    cfg = _call(find_recipe(recipe), recipe)
    try:
        process_config_with_overrides(cfg, cli_overrides=others)
    except OverridesError as error:
        raise ValueError(str(error)) from None
    apply_pools(cfg, pool, pool_documents=pool.pool_documents, strict=strict)
    return cfg


def pools_and_others(overrides: Sequence[str]) -> tuple[PoolConfig, list[str]]:
    """The PoolConfig of the model.pool_* overrides, and the overrides of other fields. model.pool_min is required."""
    values: dict[str, Any] = {"pool_documents": "routers"}
    others = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(f"override {text} must be FIELD=VALUE: {error}") from None
        if parsed.key_or_group.startswith("pool_"):
            raise ValueError(f"{text} must name a field of model: give model.{parsed.key_or_group}=VALUE")
        if not parsed.key_or_group.startswith(POOL_PREFIX):
            others.append(text)
        elif parsed.is_sweep_override():
            raise ValueError(f"{text} must give one value, because the command trains once")
        elif parsed.type is not OverrideType.CHANGE:
            raise ValueError(f"{text} must be FIELD=VALUE, without +, ++ or ~")
        elif parsed.value() in ("none", "None"):
            raise ValueError(f"{text} must be {parsed.key_or_group}=null: the word for no value is null")
        else:
            values[parsed.key_or_group.removeprefix("model.")] = parsed.value()
    if "pool_min" not in values:
        raise ValueError(
            "model.pool_min must be given: the smallest size of a pool in routed experts, such as model.pool_min=8; "
            "model.pool_min=null trains the standard MoE as a baseline"
        )
    with in_words_of_bridge():
        return pool_config_of(values, where="fields of model on the command line"), others


def find_recipe(name: str) -> Recipe:
    """Find a recipe by the name of its function in megatron.bridge's recipes or perf_recipes, or as module:function."""
    module, colon, function = name.partition(":")
    if not colon:
        known = recipes_by_name()
        if name in known:
            return known[name]
        raise ValueError(
            f"--recipe must be the name of a megatron.bridge recipe, or module:function; got {name!r}"
            f"{nearest(name, known)}; --list prints the names"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"--recipe {name}: there is no module {error.name}") from None
    if not callable(found):
        raise ValueError(f"--recipe {name}: {module} has no function {function!r}")
    return found


def moe_recipes() -> list[str]:
    """Sorted names of the MoE pretraining recipes for text.

    The names come from the recipes' source, because a call of a recipe can download a model's configuration.
    """
    return sorted(
        name
        for name, recipe in recipes_by_name().items()
        if "pretrain" in name
        and "_vl" not in recipe.__module__
        and all(word in _source_of(recipe, seen=set()) for word in SHARDED_EXPERTS)
    )


def recipes_by_name() -> dict[str, Recipe]:
    """Name -> function. If two recipes have the same name, the one in `recipes` wins over the one in `perf_recipes`."""
    modules = [recipes] + [
        importlib.import_module(found.name)
        for package in (recipes, perf_recipes)
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    ]
    known: dict[str, Recipe] = {}
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and name.endswith("_config") and name[0] != "_":
                known.setdefault(name, value)
    return known


def _source_of(function: Any, *, seen: set[Any]) -> str:
    """Source of a recipe and of the functions in Bridge's recipes that it calls."""
    seen.add(function)
    source = inspect.getsource(function)
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if (
            inspect.isfunction(called)
            and called not in seen
            and called.__module__.startswith((recipes.__name__, perf_recipes.__name__))
        ):
            source += _source_of(called, seen=seen)
    return source


def _call(recipe: Recipe, name: str) -> Any:
    required = [
        p.name
        for p in inspect.signature(recipe).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        raise ValueError(
            f"--recipe {name} must have no required arguments; it requires {', '.join(required)}. Write a function "
            "that passes these arguments, and give it as module:function"
        )
    cfg = recipe()
    if not isinstance(cfg, ConfigContainer):
        raise ValueError(f"--recipe {name} must return a ConfigContainer; got {type(cfg).__name__}")
    return cfg
