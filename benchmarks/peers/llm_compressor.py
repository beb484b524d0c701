"""REAP in llm-compressor (arXiv 2510.13999): its `oneshot` prunes a model and writes the folder of the module."""

from __future__ import annotations

from arguments import Arguments, read_arguments


def main(arguments: Arguments) -> None:
    """Prune. All settings but those of the task are llm-compressor's own."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
    from transformers import AutoConfig

    documents = arguments.documents
    rows = [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in documents]
    num_experts = AutoConfig.from_pretrained(str(arguments.model)).num_experts
    oneshot(
        model=str(arguments.model),
        dataset=Dataset.from_list(rows),
        recipe=REAPPruningModifier(sparsity=1 - arguments.keep / num_experts),
        max_seq_length=max(map(len, documents)),
        num_calibration_samples=len(rows),
        output_dir=str(arguments.output),
    )


if __name__ == "__main__":
    main(read_arguments())
