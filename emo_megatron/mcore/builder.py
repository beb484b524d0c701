"""Megatron's builder of GPT models, with pools in the layers of multi-token prediction too.

It makes the block of multi-token prediction of its own decoder layers and asks no spec, so one function of its module
is replaced while it builds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.models import gpt

from emo_megatron.config import PoolConfig
from emo_megatron.mcore.spec import with_pools


class PoolGPTModelBuilder(gpt.GPTModelBuilder):
    """Builds a model whose `transformer_layer_spec` is a `spec.pool_spec_builder`."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """One stage of the model."""
        pool = self._model_config.transformer_layer_spec.pool
        with mock.patch.object(gpt, "mtp_block_spec", _pooled(gpt.mtp_block_spec, pool)):
            return super().build_model(*args, **kwargs)


BUILDER = f"{PoolGPTModelBuilder.__module__}.{PoolGPTModelBuilder.__qualname__}"
"""For Megatron's `GPTModelConfig.builder`."""


def pool_prediction(model_config: Any, pool: PoolConfig) -> None:
    """Give pools to the block of multi-token prediction that Megatron's builder makes next for this `GPTModelConfig`.

    For a script that chose its builder before anything of this package was called: from its layer spec, which
    Megatron's builder calls first.
    """
    of_megatron = gpt.mtp_block_spec
    with_pools_there = _pooled(of_megatron, pool)

    def mtp_block_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        gpt.mtp_block_spec = of_megatron
        build = with_pools_there if config is model_config else of_megatron
        return build(config, *args, **kwargs)

    gpt.mtp_block_spec = mtp_block_spec


def _pooled(of_megatron: Callable[..., Any], pool: PoolConfig) -> Callable[..., Any]:
    """Megatron's `mtp_block_spec`, with pools in what it returns."""

    def mtp_block_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
        block = of_megatron(config, *args, **kwargs)
        if block is None:
            return None
        return with_pools(block, config=config.transformer, pool=pool)

    return mtp_block_spec
