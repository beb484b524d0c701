"""What Bridge's providers gain by pools: the fields, their check, and the recipe's own spec rewritten."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any, get_type_hints

from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.training.config.instantiate_utils import target_allowlist

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.refusals import Refusal, problems_of, problems_with_config
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.spec import with_pools

# Hugging Face weights: how the gate lies on tensor-parallel ranks, as Bridge says it of Megatron's router
AutoMapping.register_module_type(PoolRouter.__name__, "replicated")

POOL_FIELDS = tuple(field.name for field in dataclasses.fields(PoolConfig))

BRIDGE_REFUSALS = (
    Refusal(
        field="mtp_num_layers",
        allowed=(None, 0),
        kind="untried",
        reason="pools for the layers of multi-token prediction are not built; pipeline_model_parallel_layout, "
        "mtp_hybrid_override_pattern and mtp_use_repeated_layer may name such layers too",
    ),
    Refusal(
        field="pool_documents",
        allowed=("routers",),
        kind="untried",
        reason="attention that keeps to documents needs batches that are padded and cut by document",
    ),
    Refusal(
        field="moe_n_hash_layers",
        allowed=(0, None),
        kind="untried",
        reason="megatron-core 0.19 has no layers that choose experts by a token's hash",
    ),
    Refusal(
        field="enable_hyper_connections",
        allowed=(False, None),
        kind="untried",
        reason="megatron-core 0.19 has no hyper-connections",
    ),
)
"""Rows on a provider of Bridge."""


class Pooled:
    """A provider with PoolConfig's fields."""

    def pool_config(self) -> PoolConfig:
        """The pools that the fields say.

        Raises:
            ValueError: naming every field that is wrong.
        """
        with in_words_of_bridge():
            return PoolConfig(**{name: getattr(self, name) for name in POOL_FIELDS})

    def finalize(self) -> None:
        """Bridge's own, and the check that this model can have these pools.

        Raises:
            ValueError: naming every field that is wrong.
        """
        super().finalize()  # type: ignore[misc]
        require_possible(self)


class PooledGPT(Pooled):
    """Of providers that build a GPTModel from `transformer_layer_spec`."""

    def provide(self, *args: Any, **kwargs: Any) -> Any:
        """One stage of the model, built of the recipe's own layers with pools in them."""
        recipes_own = self.transformer_layer_spec  # type: ignore[has-type]
        with in_words_of_bridge():
            # run_config.yaml keeps the recipe's, and the callable keeps its signature, which Bridge looks at
            self.transformer_layer_spec = with_pools(
                recipes_own,
                config=self,
                pool=self.pool_config(),
            )
            try:
                return super().provide(*args, **kwargs)  # type: ignore[misc]
            finally:
                self.transformer_layer_spec = recipes_own


class PooledHybrid(Pooled):
    """Of providers that build a HybridModel from a stack."""

    def _resolve_hybrid_stack_spec(self) -> Any:
        with in_words_of_bridge():
            return with_pools(
                super()._resolve_hybrid_stack_spec(),  # type: ignore[misc]
                config=self,
                pool=self.pool_config(),
            )


def pooled[Provider](cls: type[Provider]) -> type[Provider]:
    """The dataclass of a provider with PoolConfig's fields, which run_config.yaml may name."""
    hints = get_type_hints(PoolConfig)
    cls.__annotations__ = {name: hints[name] for name in POOL_FIELDS}
    for field in dataclasses.fields(PoolConfig):
        setattr(cls, field.name, field.default)
    target_allowlist.add_exact(f"{cls.__module__}.{cls.__qualname__}")
    return dataclasses.dataclass(kw_only=True)(cls)


def require_possible(model: Any) -> None:
    """Raise what this provider cannot do with the pools it is given.

    Raises:
        ValueError: naming every field that is wrong.
    """
    pool = model.pool_config()
    problems = problems_of(BRIDGE_REFUSALS, model, pool)
    told = {refusal.field for refusal in BRIDGE_REFUSALS}
    for problem in problems_with_config(pool, model):
        if not any(problem.startswith("--" + field.replace("_", "-") + " ") for field in told):
            problems.append(problem)
    if problems:
        raise ValueError(
            "this recipe cannot train with document pools:\n"
            + "\n".join(f"  - {_in_words_of_bridge(p)}" for p in problems)
        )


_RENAMED = {"num_experts": "num_moe_experts"}


def _in_words_of_bridge(message: str) -> str:
    """A message about Megatron's flags, with the recipe's fields in their place."""

    def field(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return f"model.{_RENAMED.get(name, name)}"

    return re.sub(r"--([a-z0-9]+(?:-[a-z0-9]+)*)", field, message)


@contextlib.contextmanager
def in_words_of_bridge() -> Iterator[None]:
    """Let a ValueError that names flags name the recipe's fields, and drop a warning that is of other hosts."""
    with warnings.catch_warnings():
        # Bridge runs a step that dropped tokens again before the optimizer, as Megatron's training loop does
        warnings.filterwarnings("ignore", message="--moe-expert-rank-capacity-factor")
        try:
            yield
        except ValueError as error:
            raise ValueError(_in_words_of_bridge(str(error))) from error
