"""Megatron's builder of GPT models, with pools in the layers of multi-token prediction too."""

from __future__ import annotations

from typing import Any
from unittest import mock

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.models import gpt

from emo_megatron.mcore.spec import with_pools


class PoolGPTModelBuilder(gpt.GPTModelBuilder):
    """Builds a model whose `transformer_layer_spec` is a `spec.pool_spec_builder`.

    Megatron's makes the block of multi-token prediction of its own decoder layers and asks no spec.
    """

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """One stage of the model."""
        pool = self._model_config.transformer_layer_spec.pool
        of_megatron = gpt.mtp_block_spec

        def mtp_block_spec(config: Any, *args: Any, **kwargs: Any) -> Any:
            block = of_megatron(config, *args, **kwargs)
            if block is None:
                return None
            return with_pools(block, config=config.transformer, pool=pool)

        with mock.patch.object(gpt, "mtp_block_spec", mtp_block_spec):
            return super().build_model(*args, **kwargs)


BUILDER = f"{PoolGPTModelBuilder.__module__}.{PoolGPTModelBuilder.__qualname__}"
"""For Megatron's `GPTModelConfig.builder`."""
