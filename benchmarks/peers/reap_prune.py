"""REAP by its authors (arXiv 2510.13999, CerebrasResearch/reap): observe the experts, prune, and write the module.

The authors' README tells how to add a model: an entry in MODEL_ATTRS. This script adds the entries of Qwen2-MoE and of
the documents, at run time. Two modules that only the evaluation and vLLM's prompts need are replaced by empty ones.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from arguments import Arguments, read_arguments

DATASET = "documents"
ROWS = 8
"""Documents per forward pass, the authors' default."""


def _replace(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def register(arguments: Arguments) -> None:
    """Tell reap about Qwen2-MoE and about the documents."""
    import torch
    from reap import data
    from reap.model_util import MODEL_ATTRS
    from reap.observer import OBSERVER_CONFIG_REGISTRY, Qwen3MoEObserverHookConfig
    from transformers import BatchEncoding

    class Documents:
        def __init__(self, **_: Any) -> None: ...

        def get_processed_dataset(self, **_: Any) -> dict[str, list[BatchEncoding]]:
            batches = []
            for start in range(0, len(arguments.documents), ROWS):
                rows = arguments.documents[start : start + ROWS]
                longest = max(map(len, rows))
                tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
                batches.append(BatchEncoding({"input_ids": tokens, "attention_mask": mask}))
            return {"all": batches}

    def qwen2_hooks(**settings: Any) -> Any:
        found = Qwen3MoEObserverHookConfig(**settings)
        found.module_class_name_to_hook_regex = "Qwen2MoeSparseMoeBlock"
        return found

    MODEL_ATTRS["Qwen2MoeForCausalLM"] = MODEL_ATTRS["Qwen3MoeForCausalLM"]
    OBSERVER_CONFIG_REGISTRY["Qwen2MoeForCausalLM"] = qwen2_hooks
    data.DATASET_REGISTRY[DATASET] = Documents
    data._load_raw_dataset = lambda *_, **__: None


def main(arguments: Arguments) -> None:
    """Prune with the two calls that `reap.prune.main` makes.

    Settings are the authors' defaults, but with the method reap, without profiling, and without the values for merging
    experts. The last two save time.
    """
    _replace("vllm", TokensPrompt=dict)
    _replace("reap.eval", run_evaluate=None)
    from reap.args import DatasetArgs, ModelArgs, ObserverArgs, PruneArgs, ReapArgs
    from reap.main import record_activations
    from reap.prune import prune
    from transformers import AutoModelForCausalLM

    register(arguments)
    model = AutoModelForCausalLM.from_pretrained(str(arguments.model), torch_dtype="auto", local_files_only=True)
    # reap takes up observations that it finds
    with tempfile.TemporaryDirectory() as folder:
        observed = record_activations(
            model,
            None,
            ReapArgs(profile=False),
            ModelArgs(model_name=str(arguments.model)),
            DatasetArgs(dataset_name=DATASET),
            ObserverArgs(record_pruning_metrics_only=True),
            Path(folder),
        )
    prune(observed, model, PruneArgs(prune_method="reap"), model.config.num_experts - arguments.keep, arguments.output)


if __name__ == "__main__":
    main(read_arguments())
