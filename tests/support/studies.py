"""A small MoE under study in the ranks of a layout, and the documents it is studied with.

Ranks import this file by its path, so it names its neighbours whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

SEQ_LENGTH = 24


def documents(count: int = 23, *, seed: int = 3) -> list[Tensor]:
    """Documents of 1 to 40 tokens: some longer than a row."""
    from support import tiny

    generator = torch.Generator().manual_seed(seed)
    lengths = [1, *torch.randint(2, 41, (count - 1,), generator=generator).tolist()]
    return [torch.randint(1, tiny.VOCAB, (n,), generator=generator) for n in lengths]


def study(layout: dict[str, int], **config: Any) -> Any:
    """A MegatronStudy of the same model under any layout: three MoE layers after a dense one."""
    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.study import MegatronStudy
    from emo_megatron.modules.stats import ModelFacts

    from support import shards, tiny

    tiny.setup(**{"expert_tensor_parallel_size": 1} | layout)
    options: dict[str, Any] = {"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]}
    model = tiny.model(PoolConfig(pool_min=3), **options | config)
    shards.initialise([model], seed=5)
    facts = ModelFacts(
        fingerprint="f00d",
        num_experts=8,
        num_shared=1,
        top_k=2,
        layers=(2, 3, 4),
        expert_parameters=1,
        other_parameters=1,
    )
    return MegatronStudy(model, facts=facts, seq_length=SEQ_LENGTH, rows_at_once=2)


def measure(
    layout: dict[str, int],
    *,
    outputs: bool = True,
    allowed: list[list[bool]] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Statistics and loss of the test documents, as plain values."""
    studied = study(layout, **config or {})
    allowed_LE = None if allowed is None else torch.tensor(allowed)
    stats = studied.statistics(documents(), outputs=outputs, allowed_LE=allowed_LE)
    loss = studied.loss(documents(), allowed_LE=allowed_LE)
    return stats.tensors() | dataclasses.asdict(loss) | {"tokens": stats.num_tokens}
