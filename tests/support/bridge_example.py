"""examples/bridge_recipe.py where Transformer Engine and GPUs are missing, on a recipe and a model that fit a CPU.

    python -m support.bridge_example FOLDER

It runs the example twice, on a Hugging Face model that it makes and on the recipe, and prints JSON of the first: which
weights were loaded bit for bit, and which of them training moved. The first saves its checkpoint in FOLDER/hf, and
FOLDER/exported is that checkpoint as a Hugging Face model.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from support import bridge_recipes, words
from support.bridge_stand_ins import stand_ins

with stand_ins():
    import megatron.bridge.recipes.olmoe as olmoe
    from megatron.bridge import AutoBridge

import safetensors.torch
import torch
import transformers
from megatron.bridge.models.gpt_provider import local_layer_spec

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bridge_recipe.py"
STEPS = 2

Weights = dict[str, torch.Tensor]


def make_model(folder: Path) -> Weights:
    """A small Qwen3-MoE model with its tokenizer in the folder, and its weights as they lie there."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=bridge_recipes.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float32",
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    words.write_numbers(folder, size=bridge_recipes.VOCAB)
    return safetensors.torch.load_file(folder / "model.safetensors")


class Loaded:
    """The model that AutoBridge loaded last."""

    weights: Weights
    """By Hugging Face's names, as they were before training."""
    before: Weights
    """By Megatron's names."""
    chunk: Any

    @classmethod
    def see(cls, bridge: Any, chunks: list[Any]) -> list[Any]:
        """A hook after the one that loads."""
        cls.weights = {name: w.clone() for name, w in bridge.export_hf_weights(chunks, cpu=True)}
        (cls.chunk,) = chunks
        cls.before = {name: w.detach().clone() for name, w in cls.chunk.named_parameters()}
        return chunks


def without_gpu(folder: Path) -> None:
    """Make the recipe and what AutoBridge gives fit a CPU."""
    recipe, to_provider = olmoe.olmoe_7b_pretrain_config, AutoBridge.to_megatron_provider

    def small_recipe() -> Any:
        return bridge_recipes.shrink(recipe(), folder, steps=STEPS, qk_layernorm=False)

    def small_provider(bridge: Any) -> Any:
        provider = to_provider(bridge)
        for name, value in bridge_recipes.WITHOUT_GPU.items():
            # a model that is loaded is not initialized
            if name != "perform_initialization":
                setattr(provider, name, value)
        provider.transformer_layer_spec = local_layer_spec
        provider.register_pre_wrap_hook(functools.partial(Loaded.see, bridge))
        return provider

    olmoe.olmoe_7b_pretrain_config = small_recipe
    AutoBridge.to_megatron_provider = small_provider


def run_example(*arguments: str) -> None:
    """As `python examples/bridge_recipe.py ARGUMENTS` does; but processes that write checkpoints import this module."""
    sys.argv = [str(EXAMPLE), *arguments]
    runpy.run_path(str(EXAMPLE), run_name=EXAMPLE.stem)["main"]()


def export(folder: Path) -> None:
    """As docs/bridge.md exports the first run, into FOLDER/exported."""
    bridge = AutoBridge.from_hf_pretrained(str(folder / "model"))
    # the export asks ModelOpt whether weights are quantized
    with stand_ins():
        bridge.export_ckpt(str(folder / "hf"), str(folder / "exported"))


def main() -> None:
    """Run the example both ways."""
    folder = Path(sys.argv[1])
    made = make_model(folder / "model")
    without_gpu(folder / "hf")
    run_example("--hf", str(folder / "model"), "model.pool_min=3", "model.pool_max=6")
    seen = {
        "names": Loaded.weights.keys() == made.keys(),
        "loaded": [n for n, w in made.items() if torch.equal(w, Loaded.weights[n])],
        "moved": [n for n, w in Loaded.chunk.named_parameters() if not w.equal(Loaded.before[n])],
        "routers": [type(layer.mlp.router).__name__ for layer in Loaded.chunk.decoder.layers],
    }
    export(folder)
    run_example("model.pool_min=2", "checkpoint.save=null", "checkpoint.load=null")
    print(json.dumps(seen | {"made": list(made), "parameters": list(Loaded.before)}))


if __name__ == "__main__":
    main()
