"""LoRA adapters of tiny models, trained for a few steps with Hugging Face peft on a CPU."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.gate_proj", "shared_expert.up_proj"]
LINEAR += ["shared_expert.down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTER = ["gate.weight"]


def load(base: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder in transformers."""
    from transformers import Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True)


def train(base: Path, folder: Path, *, steps: int = 3, with_config: bool = False, **config: Any) -> Path:
    """Train an adapter on random tokens and save it; `config` are fields of LoraConfig."""
    import peft

    torch.manual_seed(0)
    model = load(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": []} | config))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    tokens = torch.randint(model.config.vocab_size, (2, 20))
    for _ in range(steps):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)
    if with_config:
        model.config.save_pretrained(folder)
    return folder


def edit(adapter: Path, **changes: Any) -> Path:
    """Change fields of an adapter's configuration."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return adapter


@torch.no_grad()
def logits(model: Any, tokens_T: Tensor) -> Tensor:
    """[T, V] of a model in transformers or peft."""
    result: Tensor = model.eval()(input_ids=tokens_T[None]).logits[0]
    return result


def change_of(name: str, adapter: Path, *, num_experts: int, scale: float) -> Any:
    """scale * B A of a tensor by its exported name, from what the file of an adapter of rank 4 has; 0 without."""
    stem, _, kind = name.removesuffix(".weight").rpartition(".")
    at = f"{stem}.{kind}".lstrip(".")
    if is_expert := ".experts." in name:
        experts, _, number = stem.rpartition(".")
        at = experts if kind == "down_proj" else f"{experts}.base_layer"
    stored = _stored(adapter)
    a, b = (stored.get(f"base_model.model.{at}.lora_{part}.weight") for part in "AB")
    if a is None or b is None:
        return 0.0
    if not is_expert:
        return scale * b @ a
    # A is stored expert by expert, and B rank by rank
    change = scale * b.view(-1, 4, num_experts)[:, :, int(number)] @ a.view(num_experts, 4, -1)[int(number)]
    return change if kind == "down_proj" else change.chunk(2)[kind == "up_proj"]


@functools.cache
def _stored(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")
