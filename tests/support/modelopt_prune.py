"""ModelOpt prunes models of a checkpoint to a Selection, on a CPU with a stand-in for Transformer Engine.

    python -m support.modelopt_prune JOB.json

For a process with te_on_cpu and ModelOpt on its path. JOB.json lists cases: a checkpoint, the model's configuration, a
Selection and more. The results are written to the file that JOB.json names.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Run the cases, and write the results."""
    from emo_megatron.mcore import cpu

    cpu.activate()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from support import tiny

    tiny.setup()
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.save({name: _run(case) for name, case in job["cases"].items()}, job["results"])


def _run(case: dict[str, Any]) -> dict[str, Any]:
    from emo_megatron import modelopt
    from emo_megatron.experts.selection import load_selection
    from support import checkpoints

    built = _model(case).eval()
    load_by_name(built, case["checkpoint"])
    for name, size in case.get("layout", {}).items():
        setattr(built.config, name, size)
    asked: list[int] = []

    def calibrate(model: Any) -> None:
        asked.append(1)
        checkpoints.forward(model)

    own, prune = modelopt._scores, modelopt.mtp.prune
    if case.get("wrong_ranking"):
        modelopt._scores = lambda selection, number: own(selection, number).flip(0)
    if case.get("wrong_weight"):
        modelopt.mtp.prune = functools.partial(_prune_wrongly, prune)
    try:
        loop = calibrate if case.get("calibrate") else None
        pruned, _ = modelopt.prune_experts(built, load_selection(case["selection"]), forward_loop=loop)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return {"error": type(error).__name__, "said": str(error)}
    finally:
        modelopt._scores, modelopt.mtp.prune = own, prune
    return {
        "logits": checkpoints.forward(pruned),
        "classes": [type(layer.mlp).__name__ for layer in pruned.decoder.layers],
        "dispatcher": type(pruned.decoder.layers[0].mlp.token_dispatcher).__name__,
        "asked": len(asked),
        "pools": [getattr(getattr(layer.mlp.router, "pool", None), "is_on", False) for layer in pruned.decoder.layers],
        "trains": _trains(pruned),
    }


def _prune_wrongly(prune: Any, *args: Any, **kwargs: Any) -> Any:
    """As `prune`, but one value of one expert of the second layer is another."""
    pruned, state = prune(*args, **kwargs)
    with torch.no_grad():
        pruned.decoder.layers[1].mlp.experts.local_experts[4].linear_fc2.weight[3, 5] += 0.001
    return pruned, state


def _model(case: dict[str, Any]) -> Any:
    """A GPTModel of Megatron's Transformer Engine spec, with pools if the case has pools."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from emo_megatron.config import PoolConfig
    from emo_megatron.mcore.spec import with_pools
    from support import tiny

    config = tiny.transformer_config(transformer_impl="transformer_engine", **case["config"])
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm")
    if case.get("pool"):
        spec = with_pools(spec, config=config, pool=PoolConfig(**case["pool"]))
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=tiny.VOCAB,
        max_sequence_length=tiny.SEQ * tiny.ROWS,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


@torch.no_grad()
def load_by_name(built: Any, folder: str) -> None:
    """Fill a model with the weights of a checkpoint; every weight of the checkpoint must be of the model."""
    from emo_megatron.checkpoint.reader import MegatronCheckpoint
    from emo_megatron.runners.megatron_hooks import model_weights

    checkpoint = MegatronCheckpoint(folder)
    filled = set()
    for name, _, experts, weight in model_weights(built):
        # checkpoints of Megatron's local layers name the norm before the experts as if it were fused
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        if name in checkpoint.names:
            weight.copy_(checkpoint.read(name, experts if isinstance(experts, int) else None))
            filled.add(name)
    assert filled == set(checkpoint.names), filled ^ set(checkpoint.names)


def _trains(pruned: Any) -> bool:
    """Whether the pruned model computes finite gradients for its routers, its losses included."""
    from support import tiny

    pruned.train()
    tokens = torch.randint(tiny.VOCAB, (2, tiny.SEQ), generator=torch.Generator().manual_seed(9))
    pruned(tokens, torch.arange(tiny.SEQ).expand(2, -1), None, labels=tokens).mean().backward()
    return all(
        layer.mlp.router.weight.grad is not None and bool(layer.mlp.router.weight.grad.isfinite().all())
        for layer in pruned.decoder.layers
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
