"""ModelOpt quantises a Megatron model and a Hugging Face model, and saves both.

    python -m support.modelopt_quantize FOLDER KIND ...

For a process with ModelOpt and benchmarks/ on its path, and without Transformer Engine. Writes FOLDER/results.json,
for the kind megatron a checkpoint in FOLDER/megatron, and for the kind hf a Hugging Face folder in FOLDER/hf.
"""

from __future__ import annotations

import argparse
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


def _measure(make: Any, keep: Any) -> dict[str, Any]:
    """By format: the loss, and the numbers of quantisers; `keep` saves the model of the format that it names."""
    import modelopt.torch.quantization as mtq
    from quantized_loss import FORMATS, quantize

    from support import runner_checks

    documents = runner_checks.documents(8)
    model, runner = make()
    found: dict[str, Any] = {"stored": runner.loss(documents).nats}
    for name in FORMATS:
        model, runner = make()
        counts = quantize(model, name, lambda _, runner=runner: runner.loss(documents))
        try:
            found[name] = counts | {"nats": runner.loss(documents).nats}
        except AssertionError as error:
            found[name] = counts | {"error": str(error)}
            continue
        mtq.disable_quantizer(model, lambda quantizer: ".mlp.experts." not in quantizer)
        found[name]["nats_of_experts"] = runner.loss(documents).nats
        # last, because an export changes the weights
        keep(name, model)
    return found


def _megatron(folder: Path) -> dict[str, Any]:
    from emo_megatron.config import PoolConfig
    from support import runner_checks, shards, tiny

    tiny.setup()

    def make() -> tuple[Any, Any]:
        model = tiny.model(PoolConfig(pool_min=3), num_layers=4, moe_layer_freq=[0, 1, 1, 1])
        shards.initialise([model], seed=5)
        return model, runner_checks.runner(model)

    def keep(name: str, model: Any) -> None:
        from megatron.core import dist_checkpointing, parallel_state
        from modelopt.torch.opt.plugins import save_sharded_modelopt_state

        from support import checkpoints

        if name != "int8":
            return
        folder.mkdir()
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state = model.sharded_state_dict(metadata={"dp_cp_group": group})
        common = {"args": argparse.Namespace(**checkpoints.ARGS), "checkpoint_version": 3.0, "iteration": 7}
        dist_checkpointing.save({"model": state} | common, str(folder))
        save_sharded_modelopt_state([model], str(folder), ("torch_dist", 1))

    return _measure(make, keep)


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

    return _measure(make, keep)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main()
