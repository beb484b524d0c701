"""Held-out documents as a task of lm-eval, the field's evaluation harness: bits per byte, offline.

    python -m emo_megatron eval-task --documents french.jsonl --name french --model exported/french --output tasks
    lm_eval run --model hf --model_args pretrained=exported/french --tasks french --include_path tasks

Bits per byte compare models of different tokenizers, too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from emo_megatron.modules.calibration import Calibration, load_documents
from emo_megatron.modules.files import must_not_exist, whole
from emo_megatron.modules.hf.tokenizer import Tokenizer

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""


@dataclass(frozen=True, kw_only=True)
class EvaluationTaskOptions:
    """Make a task of lm-eval of held-out documents."""

    documents: Path
    """A .jsonl file with a "text" on every line, or a .safetensors file of tokens and cu_seqlens."""
    name: str
    """Of the task: letters, digits, - and _."""
    model: Path
    """An exported model, whose tokenizer reads or writes the documents."""
    output: Path
    """Folder for lm-eval's --include_path; it may hold other tasks, but none of this name."""
    num_tokens: int | None = None
    """Take documents, in order, until there are so many tokens; all by default."""


def write_evaluation_task(options: EvaluationTaskOptions) -> Path:
    """Write NAME.jsonl, the documents, and then NAME.yaml, the task.

    Returns:
        The task's file.

    Raises:
        FileNotFoundError: there are no such documents.
        ValueError: the name is no name, a task of this name exists, or the documents or the tokenizer cannot be read.
    """
    if not re.fullmatch(r"[\w-]+", options.name):
        raise ValueError(f"--name must be letters, digits, - and _; got {options.name!r}")
    data = (options.output / f"{options.name}.jsonl").resolve()
    task = options.output / f"{options.name}.yaml"
    # the folder may be that of the documents, and they may have this name
    for path in (data, task):
        must_not_exist(path)
    tokenizer = Tokenizer(options.model)
    found = load_documents(
        options.documents,
        calibration=Calibration(num_tokens=options.num_tokens),
        tokenize=tokenizer.encode,
        vocab_size=len(tokenizer),
    )
    texts = [tokenizer.decode(document.tolist()) for document in found.tokens]
    # the inner one appears first: a task has its documents, and they do not stay where it cannot be written
    with whole(task, is_new=True) as new_task, whole(data, is_new=True) as new_data:
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts if text)
        new_data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        # a JSON string is a YAML string
        text = _TASK.format(name=json.dumps(options.name), file=json.dumps(str(data)))
        new_task.write_text(text, encoding="utf-8")
    return task
