"""Pools in Bridge's model providers: PoolConfig's fields, their checks, and pools in the recipe's own layer spec."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any, get_type_hints
from unittest import mock

from megatron.bridge.models import gpt_provider
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.config.instantiate_utils import target_allowlist

from emo_megatron.config import PoolConfig, broken, raise_problems
from emo_megatron.mcore.combinations import (
    equal_lengths_flag,
    problems_with_config,
    problems_with_exchange,
    problems_with_prediction,
)
from emo_megatron.mcore.router import PoolRouter
from emo_megatron.mcore.spec import with_pools
from emo_megatron.mcore.unsupported import only, problems_of

# for conversion from and to Hugging Face: tensor-parallel ranks replicate the gate, as with Megatron's router
AutoMapping.register_module_type(PoolRouter.__name__, "replicated")

POOL_FIELDS = tuple(field.name for field in dataclasses.fields(PoolConfig))

UNSUPPORTED = (
    only("moe_n_hash_layers", 0, None, why="megatron-core 0.19 has no hash-routed layers", is_untried=True),
    only("enable_hyper_connections", False, None, why="megatron-core 0.19 has no hyper-connections", is_untried=True),
    only("hybrid_context_parallel", False, why="it splits batches differently on every rank", is_untried=True),
)
"""Options of Bridge's providers that pools do not support."""


class Pooled:
    """A provider with PoolConfig's fields."""

    predicts_by_dense_layers = False
    """Whether layers of multi-token prediction have no experts although the last decoder layer has experts."""
    pool_documents: str
    context_parallel_size: int
    pipeline_model_parallel_size: int

    @property
    def cuts_documents(self) -> bool:
        """Whether context parallelism splits each document separately. Each document is then padded."""
        return self.pool_documents == "attention" and self.context_parallel_size > 1

    def pool_config(self) -> PoolConfig:
        """The PoolConfig of this provider's fields."""
        fields = {name: getattr(self, name) for name in POOL_FIELDS}
        if self.cuts_documents:
            # step.py splits micro-batches by document
            fields["pool_cp_partition"] = "document"
        with in_words_of_bridge():
            return PoolConfig(**fields)

    def finalize(self) -> None:
        """Finalize the provider, and check that the model supports the pools."""
        if self.cuts_documents and self.pipeline_model_parallel_size > 1:
            # the length of a padded micro-batch depends on its documents
            self.variable_seq_lengths = True
        super().finalize()  # type: ignore[misc]
        require_possible(self)


class PooledGPT(Pooled):
    """Base of providers that build a GPTModel from `transformer_layer_spec`."""

    def provide(self, *args: Any, **kwargs: Any) -> Any:
        """Build one pipeline stage of the model from the recipe's own layers with pools."""
        recipes_own, pool = self.transformer_layer_spec, self.pool_config()  # type: ignore[has-type]
        prediction_block = functools.partial(_prediction_block, recipes_own, pool)
        with in_words_of_bridge(), mock.patch.object(gpt_provider, "mtp_block_spec", prediction_block):
            # run_config.yaml keeps the recipe's own spec; Bridge inspects the callable's signature, so it stays
            self.transformer_layer_spec = with_pools(recipes_own, config=self, pool=pool)
            try:
                return super().provide(*args, **kwargs)  # type: ignore[misc]
            finally:
                self.transformer_layer_spec = recipes_own


_ONE_STAGE = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}


def _prediction_block(recipes_own: Any, pool: PoolConfig, config: Any, vp_stage: int | None = None) -> Any:
    """This stage's layers of multi-token prediction, built like the recipe's last decoder layer; None: no such layers.

    Bridge's own function uses Megatron's layer instead of the recipe's on a stage without decoder layers, and always
    requires Transformer Engine.
    """
    if not config.mtp_num_layers:
        return None
    whole = copy.copy(config)
    vars(whole).update(_ONE_STAGE)
    spec = recipes_own if isinstance(recipes_own, ModuleSpec) else recipes_own(whole)
    if isinstance(spec, ModuleSpec):
        spec = TransformerBlockSubmodules(layer_specs=[spec])
    uses_te = config.transformer_impl == "transformer_engine"
    block = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=uses_te, vp_stage=vp_stage)
    return None if block is None else with_pools(block, config=config, pool=pool)


class PooledHybrid(Pooled):
    """Base of providers that build a HybridModel from a stack."""

    def provide(self, *args: Any, **kwargs: Any) -> Any:
        """Build one pipeline stage of the model from the recipe's own layers with pools."""
        with in_words_of_bridge():
            return super().provide(*args, **kwargs)  # type: ignore[misc]

    def _resolve_hybrid_stack_spec(self) -> Any:
        stack = super()._resolve_hybrid_stack_spec()  # type: ignore[misc]
        return with_pools(stack, config=self, pool=self.pool_config())


def pooled(provider: type, kind: type[Pooled], **attributes: Any) -> Any:
    """Create a provider's dataclass with PoolConfig's fields, for bridge.providers; run_config.yaml may name it."""
    module, name = "emo_megatron.bridge.providers", f"Pool{provider.__name__}"
    hints = get_type_hints(PoolConfig)
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(PoolConfig)}
    fields |= {"__annotations__": {field: hints[field] for field in POOL_FIELDS}, "__module__": module}
    target_allowlist.add_exact(f"{module}.{name}")
    doc = {"__doc__": f"Bridge's {provider.__name__}, with pools."}
    return dataclasses.dataclass(kw_only=True)(type(name, (kind, provider), fields | attributes | doc))


def require_possible(model: Any) -> None:
    """Raise a ValueError with all options of this provider that its pools do not support."""
    pool = model.pool_config()
    is_packed, needs = pool.pool_documents == "attention", equal_lengths_flag(model)
    problems = problems_of(UNSUPPORTED, model) + problems_with_config(pool, model)
    problems += problems_with_exchange(model, is_cut=model.cuts_documents)
    problems += problems_with_prediction(model, is_packed=is_packed)
    problems += broken(
        (
            is_packed and "M" in (getattr(model, "hybrid_layer_pattern", None) or ""),
            "--pool-documents must be routers with Mamba layers, M in --hybrid-layer-pattern; got 'attention': a reset "
            "of Mamba layers at every document is untested",
        ),
        (
            model.cuts_documents and needs,
            f"--pool-documents must be routers with {needs} and --context-parallel-size above 1; got 'attention': "
            "every rank must have the same number of tokens, but padding of documents gives ranks different numbers",
        ),
    )
    raise_problems("this recipe cannot train with document pools", [_in_words_of_bridge(p) for p in problems])


def _in_words_of_bridge(message: str) -> str:
    """Replace Megatron's flags in a message by the recipe's fields."""

    def field(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return "model.num_moe_experts" if name == "num_experts" else f"model.{name}"

    # fields have values: a flag that must not be given is a field with the value False or None
    message = message.replace(" must not be given: ", " must be False: ").replace(
        " must not be given; got ", " must be None (null in an override); got "
    )
    return re.sub(r"--([a-z0-9]+(?:-[a-z0-9]+)*)", field, message)


@contextlib.contextmanager
def in_words_of_bridge() -> Iterator[None]:
    """Replace flags by the recipe's fields in messages of ValueErrors; ignore a warning that is wrong for Bridge."""
    with warnings.catch_warnings():
        # Bridge repeats a step that dropped tokens before the optimizer step, like Megatron's training loop
        warnings.filterwarnings("ignore", message="--moe-expert-rank-capacity-factor")
        try:
            yield
        except ValueError as error:
            raise ValueError(_in_words_of_bridge(str(error))) from error
