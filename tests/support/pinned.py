"""A small model with values that are the same on any machine, and what files of every kind hold, as JSON."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support import words
from support.pretraining import stored_tensors

VOCAB, WIDTH, EXPERTS = 64, 32, 8
CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size": 24,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "qkv_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "eos_token_id": 0,
    "emo_megatron": {"pools": {"pool_min": 3}},
}
"""A dense layer, then two with routed experts; document pools are written down."""
UNTOLD = re.compile(r"created_by|versions?|.*_version")
"""Fields that differ by version."""
MARK = re.compile(r"[0-9a-f]{16}")
"""What tells a model apart, by the configuration that a version of transformers writes, too."""
FLAGS = re.findall(
    r"\w+",
    """
    num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size vocab_size padded_vocab_size
    max_position_embeddings seq_length position_embedding_type rotary_base normalization layernorm_epsilon swiglu
    untie_embeddings_and_output_weights add_bias_linear add_qkv_bias transformer_impl tokenizer_type params_dtype
    num_experts moe_layer_freq moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_num_groups
    moe_router_group_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
    consumed_train_samples iteration pool_min pool_max pool_scope pool_mask pool_min_decay_samples pool_seed
    """,
)
"""Of a checkpoint: what its model and its pools are. Others are Megatron's defaults, which differ by its version."""


def values(count: int, *, seed: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Whole numbers from 0 to 255 that look random, by integers alone."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(7919 * seed + 1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x >> np.uint32(24)


def write_model(folder: Path, tokenizer: Path) -> Path:
    """A Hugging Face folder of CONFIG; weights are multiples of 1/256, so that their sums and blends are exact."""
    folder.mkdir(parents=True)
    weights = {}
    for at, (name, shape) in enumerate(_shapes()):
        number = torch.from_numpy(values(int(np.prod(shape)), seed=at).astype(np.float32)).view(shape)
        weights[name] = number / 256 + 0.5 if len(shape) == 1 else (number - 128) / 256
        if name.endswith("shared_expert_gate.weight"):
            weights[name] = torch.zeros(shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("model.embed_tokens.weight", (VOCAB, WIDTH)), ("lm_head.weight", (VOCAB, WIDTH)))
    yield "model.norm.weight", (WIDTH,)
    for layer in range(3):
        at = f"model.layers.{layer}"
        yield from ((f"{at}.{kind}_layernorm.weight", (WIDTH,)) for kind in ("input", "post_attention"))
        for kind, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            yield f"{at}.self_attn.{kind}_proj.weight", (rows, WIDTH)
        if layer == 0:
            yield from _mlp(f"{at}.mlp", 24)
            continue
        yield f"{at}.mlp.gate.weight", (EXPERTS, WIDTH)
        yield f"{at}.mlp.shared_expert_gate.weight", (1, WIDTH)
        yield from _mlp(f"{at}.mlp.shared_expert", 16)
        for expert in range(EXPERTS):
            yield from _mlp(f"{at}.mlp.experts.{expert}", 16)


def _mlp(at: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{at}.{kind}_proj.weight", (hidden, WIDTH)) for kind in ("gate", "up"))
    yield f"{at}.down_proj.weight", (WIDTH, hidden)


def write_documents(path: Path, *, seed: int) -> None:
    """Documents of 4 to 40 tokens, each with its end; the words differ by seed."""
    lengths = [4 + int(n) % 37 for n in values(9, seed=seed)]
    documents = [
        [*(2 + (values(n, seed=100 * seed + at) * (1 + seed % 3) % (VOCAB - 2 - 7 * (seed % 3)))).tolist(), 0]
        for at, n in enumerate(lengths)
    ]
    words.write_tokens(path, [torch.tensor(document).int() for document in documents])


def digest(tensor: Tensor) -> str:
    """Type, shape and the first digits of a digest of the bits."""
    bits = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"


def of_json(path: Path) -> Any:
    """A JSON file without what differs by version."""
    return told(json.loads(path.read_text()))


def told(value: Any) -> Any:
    """A parsed file without what differs by version."""
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if not UNTOLD.fullmatch(str(k))}
        return {k: told(v) for k, v in kept.items() if not (k == "weights" and MARK.fullmatch(str(v)))}
    return [told(v) for v in value] if isinstance(value, list | tuple) else value


def of_statistics(path: Path) -> Any:
    """Tensors as numbers, and what is said of them."""
    with safe_open(path, "pt") as file:
        said = {k: json.loads(v) if v[0] in "{[" else v for k, v in file.metadata().items()}
        return {"tensors": {k: file.get_tensor(k).tolist() for k in sorted(file.keys())}} | told(said)


def of_checkpoint(folder: Path) -> Any:
    """A Megatron checkpoint by torch's own reader: digests of its tensors, its flags, and the files beside."""
    from megatron.core import dist_checkpointing

    (metadata,) = folder.rglob(".metadata")
    args = vars(dist_checkpointing.load_common_state_dict(str(metadata.parent))["args"])
    return {
        "tensors": {k: digest(v) for k, v in sorted(stored_tensors(metadata.parent).items())},
        "flags": {k: v if isinstance(v := args[k], int | float | str | None) else str(v) for k in FLAGS},
        "files": {path.name: of_json(path) for path in sorted(folder.glob("*.json"))},
    }


def of_safetensors(folder: Path) -> dict[str, str]:
    """Digests of the tensors of all its files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {k: digest(file.get_tensor(k)) for k in file.offset_keys()}
    return dict(sorted(tensors.items()))


def of_hugging_face(folder: Path) -> Any:
    """An exported model: digests of its tensors, config.json, the Selection, and the numbers of its card."""
    card = (folder / "README.md").read_text()
    return {
        "tensors": of_safetensors(folder),
        "config": of_json(folder / "config.json"),
        "files": sorted(path.name for path in folder.iterdir()),
        "selection": of_json(folder / "selection.json") if (folder / "selection.json").exists() else None,
        "card": sorted(float(number) for number in re.findall(r"(?<![\w.])\d+\.\d{3}(?![\w.])", card)),
    }


def of_rows(folder: Path) -> Any:
    """What `retention` writes: rows, the same as JSON and as a table."""
    rows = of_json(folder / "retention.json")
    with (folder / "retention.csv").open(newline="") as file:
        table = told(list(csv.DictReader(file)))
    drawn = [name for name in ("retention.png", "retention.txt") if (folder / name).stat().st_size > 300]
    return {"rows": rows, "table": [{k: _number(v) for k, v in row.items()} for row in table], "drawn": drawn}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def differences(found: Any, wanted: Any, *, at: str = "") -> Iterator[str]:
    """Where two parsed files differ: numbers with a point by more than 1e-5 of them, all else at all."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if key in found and key in wanted:
                yield from differences(found[key], wanted[key], at=f"{at}/{key}")
            else:
                yield f"{at}/{key} is {'new' if key in found else 'gone'}"
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from differences(one, other, at=f"{at}/{index}")
    elif isinstance(found, float) and isinstance(wanted, int | float):
        if found != pytest.approx(wanted, rel=1e-5, abs=1e-12):
            yield f"{at}: {found}, was {wanted}"
    elif found != wanted:
        yield f"{at}: {found}, was {wanted}"
