"""The command bridge: a recipe by name, the command line's changes, pools; then Bridge's own training."""

from __future__ import annotations

import difflib
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

from emo_megatron.bridge.pooled import in_words_of_bridge
from emo_megatron.bridge.recipe import apply_pools, is_first_rank
from emo_megatron.bridge.step import pool_forward_step
from emo_megatron.config import PoolConfig, pool_config_of

Recipe = Callable[[], Any]

POOL_PREFIX = "model.pool_"
SHARDED_EXPERTS = ("expert_model_parallel_size", "moe")
"""Words in the source of every recipe of an MoE model, and of no other."""


def run(recipe: str, overrides: Sequence[str], *, strict: bool) -> str | None:
    """Train a recipe with pools, as a process of its own or a rank of torchrun; arguments as `prepare`'s.

    Returns:
        Where its checkpoints lie; None if it saves none, and on other ranks than the first.
    """
    cfg = prepare(recipe, overrides, strict=strict)
    try:
        pretrain(cfg, pool_forward_step)
    except Exception:
        # the command line tells errors in one line, which of a long run on many ranks is not enough
        traceback.print_exc()
        raise
    return cfg.checkpoint.save if is_first_rank() else None


def prepare(recipe: str, overrides: Sequence[str], *, strict: bool = False) -> Any:
    """The ConfigContainer of a recipe with the command line's changes and pools, checked, for Bridge's pretrain().

    The changes come first, so that they can make a recipe one that takes pools.

    Args:
        recipe: as `find_recipe` takes it.
        overrides: in Hydra's words, such as `model.pool_min=8`, `train.train_iters=100`.
        strict: refuse a recipe of which an option must change.
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
    """The pools that overrides of model.pool_* say, model.pool_min among them, and the overrides of other fields."""
    values: dict[str, Any] = {"pool_documents": "routers"}
    others = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            raise ValueError(f"{text} must be FIELD=VALUE: {error}") from None
        if not parsed.key_or_group.startswith(POOL_PREFIX):
            others.append(text)
        elif parsed.is_sweep_override():
            raise ValueError(f"{text} must give one value; this command runs one training")
        elif parsed.type is not OverrideType.CHANGE:
            raise ValueError(f"{text} must be FIELD=VALUE, without +, ++ or ~")
        else:
            values[parsed.key_or_group.removeprefix("model.")] = parsed.value()
    if "pool_min" not in values:
        raise ValueError(
            "model.pool_min must be given: the smallest pool in routed experts, such as model.pool_min=8; "
            "model.pool_min=null trains the standard MoE to compare with"
        )
    with in_words_of_bridge():
        return pool_config_of(values, where="fields of model on the command line"), others


def find_recipe(name: str) -> Recipe:
    """A recipe by the bare name of its function in megatron.bridge's recipes or perf_recipes, or as module:function."""
    module, colon, function = name.partition(":")
    if not colon:
        known = recipes_by_name()
        if name in known:
            return known[name]
        nearest = difflib.get_close_matches(name, known, n=3) or ["see --list"]
        raise ValueError(
            f"--recipe must be the name of a recipe of megatron.bridge, or module:function; got {name!r}; "
            f"nearest: {', '.join(nearest)}"
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
    """Names of the MoE pretraining recipes on text, sorted.

    Read off their source: calling them would ask a hub for the models' configurations.
    """
    return sorted(
        name
        for name, recipe in recipes_by_name().items()
        if "pretrain" in name
        and "_vl" not in recipe.__module__
        and all(word in _source_of(recipe, seen=set()) for word in SHARDED_EXPERTS)
    )


def recipes_by_name() -> dict[str, Recipe]:
    """Bare name -> function. Of two of one name the library's goes before the benchmark's, as it is imported there."""
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
    """Of a recipe and those of Bridge's functions that it calls."""
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
            f"--recipe {name} must need no arguments; it needs {', '.join(required)}. Write a function of your own "
            "that gives them, and name it as module:function"
        )
    cfg = recipe()
    if not isinstance(cfg, ConfigContainer):
        raise ValueError(f"--recipe {name} must return a ConfigContainer; it returned a {type(cfg).__name__}")
    return cfg
