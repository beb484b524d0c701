"""ModelOpt quantises a Megatron model and a Hugging Face model, and saves both.

    python -m support.modelopt_quantize FOLDER KIND ...

For a process with ModelOpt and benchmarks/ on its path, and without Transformer Engine. Writes FOLDER/results.json,
for the kind megatron a checkpoint in FOLDER/megatron, and for the kind hf a Hugging Face folder in FOLDER/hf.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Quantise both models in every format."""
    from emo_megatron.mcore import cpu

    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    if "megatron" in sys.argv[2:]:
        cpu.activate()
        torch.distributed.init_process_group("gloo")
        found["megatron"] = _megatron(folder / "megatron")
    if "hf" in sys.argv[2:]:
        found["hf"] = _hugging_face(folder)
    (folder / "results.json").write_text(json.dumps(found))


def _measure(make: Any, logits_of: Any, experts_of: Any, keep: Any) -> dict[str, Any]:
    """By format: relative errors of the logits, and the numbers of quantisers.

    `swapped` is, by layer, the largest error that two experts of the stored model make in each other's place.

    Args:
        make: the stored model, and its runner.
        logits_of: logits of fixed tokens.
        experts_of: by layer and expert, the weights of a model.
        keep: saves the model of the format that it names.
    """
    import modelopt.torch.quantization as mtq
    from quantized_loss import FORMATS, quantize

    from support import runner_checks

    documents = runner_checks.documents(8)
    model, _ = make()
    stored = logits_of(model).double()

    def error(changed: Any) -> float:
        return float((logits_of(changed).double() - stored).norm() / stored.norm())

    def error_of_swap(one: Any, other: Any) -> float:
        _swap(one, other)
        try:
            return error(model)
        finally:
            _swap(one, other)

    pairs_of_layers = [itertools.combinations(experts, 2) for experts in experts_of(model)]
    found: dict[str, Any] = {"swapped": [max(itertools.starmap(error_of_swap, pairs)) for pairs in pairs_of_layers]}
    assert error(model) == 0
    for name in FORMATS:
        model, runner = make()
        counts = quantize(model, name, lambda _, runner=runner: runner.loss(documents))
        try:
            found[name] = counts | {"error": error(model)}
        except AssertionError as told:
            found[name] = counts | {"needs_gpu": str(told)}
            continue
        mtq.disable_quantizer(model, lambda quantizer: ".mlp.experts." not in quantizer)
        found[name]["error_of_experts"] = error(model)
        # last, because an export changes the weights
        keep(name, model)
    return found


@torch.no_grad()
def _swap(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def _megatron(folder: Path) -> dict[str, Any]:
    from emo_megatron.config import PoolConfig
    from support import checkpoints, runner_checks, shards, tiny

    tiny.setup()

    def make() -> tuple[Any, Any]:
        model = tiny.model(PoolConfig(pool_min=3), num_layers=4, moe_layer_freq=[0, 1, 1, 1])
        shards.initialise([model], seed=5)
        return model, runner_checks.runner(model)

    def keep(name: str, model: Any) -> None:
        from megatron.core import dist_checkpointing, parallel_state
        from modelopt.torch.opt.plugins import save_sharded_modelopt_state

        if name != "int8":
            return
        folder.mkdir()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = model.sharded_state_dict(metadata={"dp_cp_group": group})
        common = {"args": argparse.Namespace(**checkpoints.ARGS), "checkpoint_version": 3.0, "iteration": 7}
        dist_checkpointing.save({"model": state} | common, str(folder))
        save_sharded_modelopt_state([model], str(folder), ("torch_dist", 1))

    def experts_of(model: Any) -> list[list[list[torch.Tensor]]]:
        layers = [layer.mlp.experts.local_experts for layer in model.decoder.layers[1:]]
        return [[[*expert.parameters()] for expert in experts] for experts in layers]

    return _measure(make, checkpoints.forward, experts_of, keep)


def _hugging_face(folder: Path) -> dict[str, Any]:
    from emo_megatron.runners.huggingface import HuggingFaceRunner, load_hugging_face
    from support import decoder

    stored = decoder.write_folder(folder / "stored")

    def make() -> tuple[Any, Any]:
        model = load_hugging_face(stored)
        return model, HuggingFaceRunner(model, seq_length=40, micro_batch_size=4)

    def keep(name: str, model: Any) -> None:
        from modelopt.torch.export import export_hf_checkpoint

        if name == "fp8":
            export_hf_checkpoint(model, export_dir=folder / "hf")

    tokens = torch.randint(1, 80, (4, 40), generator=torch.Generator().manual_seed(9))

    @torch.no_grad()
    def logits_of(model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
        return logits

    def experts_of(model: Any) -> list[list[tuple[torch.Tensor, ...]]]:
        layers = [layer.mlp.experts for layer in model.model.layers]
        return [[*zip(experts.gate_up_proj, experts.down_proj, strict=True)] for experts in layers]

    return _measure(make, logits_of, experts_of, keep)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
