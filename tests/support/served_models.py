"""Tiny models that engines run: weights into Megatron, a module cut out, both exported by the commands.

Ranks import this file by its path, so it names its neighbours whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
from safetensors.torch import load_file, save_file

from emo_megatron.hf.gguf import FILE

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 32,
    "num_experts": 16,
    "top_k": 2,
    "expert_hidden": 64,
    "shared_hidden": 64,
    "rope_theta": 10000.0,
    "max_positions": 128,
    "norm_eps": 1e-5,
}
"""Sizes that the kernels of the engines support: their attention for CPUs has no head below a width of 32."""
KEPT = ((0, 3, 5, 9, 12, 15), (1, 2, 4, 7, 8, 14), (2, 3, 6, 10, 11, 13))
"""Routed experts of the module, layer by layer."""
FULL, MODULE, TIED, DENSE = "full model", "module", "tied, with biases", "dense layers"
CHANGED = "module, one weight changed"
MODELS: dict[str, dict[str, Any]] = {
    FULL: {},
    MODULE: {"renormalise": True, "num_kv_heads": 2, "shared_hidden": 128},
    # a shared expert that is not a multiple of a routed expert
    TIED: {"tied": True, "qkv_bias": True, "num_kv_heads": 1, "shared_hidden": 96},
    DENSE: {"dense_layers": (0, 2), "dense_hidden": 96},
}
"""Name of an export -> what differs from SIZES. The router's top-k is renormalised in the module only."""
TEXTS = (
    "the module keeps the experts of a document",
    " ".join(f"w{(7 * n * n + 3) % 100}" for n in range(60)),
    "and route token and route pool",
    " ".join(f"w{(11 * n * n + n) % 100} experts" for n in range(24)),
)
"""Prompts of 8, 60, 6 and 48 tokens, which an engine runs in one batch."""


def path_of(folder: Path, name: str, *, format: str = "qwen2_moe") -> Path:
    """The export of a model: its folder, or its file for llama.cpp."""
    return folder / "gguf" / name / FILE if format == "gguf" else folder / name


def export(folder: str) -> None:
    """Write the exports of MODELS to the places of `path_of`; a model with dense layers has no file for llama.cpp."""
    from emo_megatron.commands import export, extract, import_
    from support import decoder, words
    from support.checkpoints import selection_of

    root = Path(folder)
    # llama.cpp does not have the tokenizer of the other exports; its texts are token ids
    bytes_tokenizer = words.write_bytes(root / "bytes")
    for seed, (name, changes) in enumerate(MODELS.items()):
        work = root / "work" / name
        model = decoder.architecture(**(SIZES | changes))
        # half of the decoder's weights, which are for 32 features: here are four times as many
        weights = {n: w / 2 if w.dim() > 1 else w for n, w in decoder.random_weights(model, seed=seed).items()}
        source = decoder.write_folder(work / "source", model=model, weights=weights)
        words.write_tokenizer(source, size=SIZES["vocab_size"])
        checkpoint = import_.run(import_.Options(folder=source, output=work / "megatron", parity_tokens=0)).path
        if name == MODULE:
            kept = selection_of(checkpoint, list(map(list, KEPT)), num_experts=SIZES["num_experts"])
            selection = kept.save(work / "selection.json")
            checkpoint = extract.run(
                extract.Options(checkpoint=checkpoint, selection=selection, output=work / "module")
            )
        export.run(export.Options(checkpoint=checkpoint, output=root / name))
        if name != DENSE:
            output = path_of(root, name, format="gguf").parent
            export.run(export.Options(checkpoint=checkpoint, output=output, format="gguf", tokenizer=bytes_tokenizer))


def change_a_weight(folder: Path) -> None:
    """Write CHANGED: the module with one routed expert of one layer larger by a hundredth."""
    changed = shutil.copytree(folder / MODULE, folder / CHANGED)
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.mlp.experts.2.down_proj.weight"] *= 1.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    changed = path_of(folder, CHANGED, format="gguf")
    shutil.copytree(path_of(folder, MODULE, format="gguf").parent, changed.parent)
    reader = gguf.GGUFReader(changed, "r+")
    (stored,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    stored.data[2] *= 1.01
    reader.data.flush()
