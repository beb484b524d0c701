"""The pruning scripts of EMO's authors (allenai/EMO, src/hf_training): greedy layer by layer, or their EASY-EP.

    emo_prune.py greedy ... or emo_prune.py easy_ep ...

The scripts take models whose blocks state a number of shared experts among the experts; the shared expert of Qwen2-MoE
is apart, so the number is 0. The module that loads evaluation tasks is replaced by one that returns the documents.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from arguments import Arguments, read_arguments


class _Output(tuple[Any, ...]):
    """What a layer returns: in EMO a tensor, in Qwen2-MoE a tuple of one tensor. The scripts call `detach`."""

    def detach(self) -> Any:
        return self[0].detach()


def main(which: str, arguments: Arguments) -> None:
    """Prune with the authors' defaults."""
    tasks = types.ModuleType("src.hf_training.data_utils")
    vars(tasks)["get_formatted_prompts"] = lambda *_, **__: (arguments.texts, None)
    sys.modules[tasks.__name__] = tasks
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeDecoderLayer, Qwen2MoeSparseMoeBlock

    Qwen2MoeSparseMoeBlock.num_shared_experts = 0
    forward = Qwen2MoeDecoderLayer.forward
    Qwen2MoeDecoderLayer.forward = lambda self, *inputs, **named: _Output(forward(self, *inputs, **named))
    settings = {
        "model_name": str(arguments.model),
        "task_name": "documents",
        "split": "train",
        "prune_keep_k": arguments.keep,
        "num_shared_experts": 0,
        "save_path": str(arguments.output),
        # the scripts look for a GPU unless a device is given
        "device": "cpu",
    }
    if which == "greedy":
        from src.hf_training.greedy_prune_layerwise import greedy_prune_layerwise

        greedy_prune_layerwise(**settings)
    else:
        from src.hf_training.easy_ep_prune import easy_ep_prune

        easy_ep_prune(**settings)


if __name__ == "__main__":
    which = sys.argv.pop(1)
    main(which, read_arguments())
