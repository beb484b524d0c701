"""LoRA in Bridge on small exported folders: `python -m support.bridge_lora FOLDER`, which writes lora.json.

Bridge trains one adapter, saves its own checkpoint, and exports the adapter for peft. Adapters of CASES have random
values. The logits of the adapted model, as Bridge has it when it exports, go into a file beside the adapter.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from support import bridge_recipes, decoder
from support.bridge_hf import VOCAB, folder_of, groups, logits, model_of, provider, tried
from support.bridge_server import end_of, fork
from support.bridge_stand_ins import stand_ins

with stand_ins():
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora import LoRA
    from megatron.bridge.recipes.olmoe import olmoe_7b_pretrain_config
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

import torch
from safetensors.torch import save_file

from emo_megatron.mcore.dataset import write_indexed_dataset

# Transformer Engine, which a stand-in stands for, has no layers here
utils.HAVE_TE = False
STEPS = 3
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "update.md").read_text()
PATHS = ("exported/perl", "runs/perl_bridge/iter_0001000", "adapters/perl")
"""Folder, run and adapter on the page."""
CASES: dict[str, dict[str, Any]] = {
    "gated": {"model": {"shared_gate": True, "qkv_bias": True}},
    "dense": {"model": {"shared_hidden": 24, "dense_layers": (0, 2), "dense_hidden": 20}},
    "experts": {"lora": {"target_modules": ["*.local_experts.*.linear_fc1", "*.local_experts.*.linear_fc2"]}},
    "down": {"lora": {"target_modules": ["*.layers.1.mlp.experts.local_experts.*.linear_fc2"]}},
    "shared": {"lora": {"target_modules": ["*.shared_experts.linear_fc2"]}},
    "router": {"lora": {"target_modules": ["linear_qkv", "router"]}},
    "normalised": {"lora": {"normalize_moe_lora": True}},
    "gate and up": {"lora": {"target_modules": ["*.local_experts.*.linear_fc1"]}},
    "router of the authors": {"format": "emo", "lora": {"target_modules": ["router"]}},
}


def train(base: Path, run: Path, adapter: Any, data: str) -> None:
    """Bridge's own fine-tuning with LoRA of the model in a folder."""
    cfg = bridge_recipes.shrink(olmoe_7b_pretrain_config(), run, steps=STEPS)
    cfg.model = provider(AutoBridge.from_hf_pretrained(str(base)))
    cfg.tokenizer.vocab_size = VOCAB - 1
    cfg.dataset.seq_length = cfg.model.seq_length
    cfg.dataset.data_path, cfg.dataset.split = data, "100,0,0"
    cfg.dataset.path_to_cache = str(run / "cache")
    cfg.checkpoint.pretrained_checkpoint = str(base)
    cfg.peft = adapter
    # the second factor starts at zero
    cfg.optimizer.lr = 0.1
    pretrain(cfg, forward_step)


def export(base: Path, run: Path, output: Path) -> list[str]:
    """Run the code of docs/update.md that exports an adapter; the error, if there is one."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "AutoBridge" in block)
    for name, path in zip(PATHS, (base, run, output), strict=True):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    give, save = AutoBridge.to_megatron_provider, AutoBridge.save_hf_adapter

    def to_megatron_provider(bridge: Any, **options: Any) -> Any:
        return without_gpu(give(bridge, **options))

    def save_hf_adapter(bridge: Any, model: Any, path: Path, **options: Any) -> None:
        save(bridge, model, path, **options)
        save_file({"logits": logits(model)}, path.with_suffix(".safetensors"))

    with (
        mock.patch.object(AutoBridge, "to_megatron_provider", to_megatron_provider),
        mock.patch.object(AutoBridge, "save_hf_adapter", save_hf_adapter),
        stand_ins(),
    ):
        return tried(exec, code, {"__name__": "__main__"})


def without_gpu(provider: Any) -> Any:
    """The provider, without the parts of a GPU."""
    for name, value in (bridge_recipes.WITHOUT_GPU | {"perform_initialization": False}).items():
        setattr(provider, name, value)
    return provider


def trained(folder: Path) -> list[str]:
    """The adapter of a fine-tuning; the error of its export, if there is one."""
    documents = [[(7 * start + 3 * place) % (VOCAB - 1) for place in range(60)] for start in range(200)]
    write_indexed_dataset(folder / "documents", documents, vocab_size=VOCAB)
    base = folder_of(folder / "base", "qwen2_moe", decoder.architecture(num_kv_heads=2))
    environment = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    adapter, out = LoRA(dim=4, alpha=8), folder / "train.txt"
    # before this process has threads of its own
    code = end_of(fork(lambda: train(base, folder / "run", adapter, str(folder / "documents")), out=out, **environment))
    assert code == 0, out.read_text()[-3000:]
    return export(base, folder / "run" / f"iter_{STEPS:07d}", folder / "adapter")


def random(folder: Path, *, format: str = "qwen2_moe", model: dict[str, Any], lora: dict[str, Any]) -> list[str]:
    """An adapter with random values; the error of its export, if there is one."""
    base = folder_of(folder / "base", format, decoder.architecture(**model))
    with groups(), stand_ins():
        bridge = AutoBridge.from_hf_pretrained(str(base))
        adapter = LoRA(dim=4, alpha=8, **lora)
        chunks = adapter(model_of(bridge), training=True)
        for number, (name, parameter) in enumerate(chunks[0].named_parameters()):
            if ".adapter." in name:
                draw = torch.Generator().manual_seed(number)
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
        save_file({"logits": logits(chunks)}, folder / "adapter.safetensors")
        return tried(bridge.save_hf_adapter, chunks, folder / "adapter", peft_config=adapter, show_progress=False)


def main() -> None:
    folder = Path(sys.argv[1])
    found = {"trained": trained(folder / "trained")}
    found |= {name: random(folder / name, **({"model": {}, "lora": {}} | chosen)) for name, chosen in CASES.items()}
    (folder / "lora.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
