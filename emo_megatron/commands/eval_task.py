"""The command eval-task: write validation documents as a task of lm-eval. Bits per byte compare models that have
different tokenizers.
"""

from __future__ import annotations

import glob
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from emo_megatron.commands.options import check_least, unset
from emo_megatron.experts.calibration import Calibration, is_text, load_documents, read_file
from emo_megatron.files import must_not_exist, whole
from emo_megatron.hf.tokenizer import Tokenizer

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
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
_UNLOADABLE = re.compile(r"::|\$[\w{]")
"""In a path: the loader's sign of an archive, and variables, which it puts values for."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d(:?\d\d)?(:?\d\d)?(\.\d+)?(Z|[+-]\d\d:?\d\d)?)?")
"""What a column of is no text to the loader."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write validation documents as a task of lm-eval, which measures bits per byte.

    For example:
        emo_megatron eval-task --documents french.jsonl --name french --model exported/french --output tasks
        lm_eval run --model hf --model_args pretrained=exported/french --tasks french --include_path tasks
    """

    documents: Path
    """A .jsonl file with a field "text" per line, or a .safetensors file with tokens and cu_seqlens."""
    name: str
    """Name of the task: letters, digits, - and _."""
    model: Path
    """Exported model. Its tokenizer decodes tokens into text, and counts --num-tokens."""
    output: Path
    """Folder for lm-eval's --include_path. The folder may hold other tasks, but none of this name."""
    num_tokens: Annotated[int | None, unset("INT", "all documents")] = None
    """Stop adding documents when this number of tokens is reached."""

    def __post_init__(self) -> None:
        check_least(self, 1, "num_tokens")


def run(options: Options) -> Path:
    """Write NAME.jsonl, the documents, and then NAME.yaml, the task, which is returned."""
    if not re.fullmatch(r"[\w-]+", options.name):
        raise ValueError(f"--name must be letters, digits, - and _; got {options.name!r}")
    data = (options.output / f"{options.name}.jsonl").resolve()
    task = options.output / f"{options.name}.yaml"
    # the folder may be that of the documents, and they may have this name
    for path in (data, task):
        must_not_exist(path)
    file = _pattern(data)
    texts = _texts(options.documents, Tokenizer(options.model), num_tokens=options.num_tokens)
    # the inner one appears first: a task has its documents, and they do not stay where it cannot be written
    with whole(task, is_new=True) as new_task, whole(data, is_new=True) as new_data:
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        new_data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = _TASK.format(name=_quoted(options.name), file=_quoted(file))
        new_task.write_text(text, encoding="utf-8")
    return task


def _texts(path: Path, tokenizer: Tokenizer, *, num_tokens: int | None) -> list[str]:
    """The documents that hold text, in order: texts as they are, tokens as what they stand for."""
    found: list[str] = []
    taken = num_empty = 0
    for text, ids in _documents(path, tokenizer):
        if num_tokens is not None and taken >= num_tokens:
            break
        if text and tokenizer.has_text(ids):
            found.append(text)
            taken += len(ids)
        else:
            num_empty += 1
    if not found:
        raise ValueError(f"{path} holds no text: its documents are empty, or special tokens only")
    if all(_TIME.fullmatch(text) for text in found):
        raise ValueError(f"{path} holds dates only, which lm-eval reads as times and not as text: add another document")
    if num_empty:
        print(f"{num_empty} documents without text were left out", file=sys.stderr)
    return found


def _documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[str, Sequence[int]]]:
    """Text and tokens of each document."""
    if is_text(path):
        for text in read_file(path):
            yield text, tokenizer.encode(text)
        return
    for tokens in load_documents(path, calibration=Calibration(), vocab_size=tokenizer.rows).tokens:
        ids = tokens.tolist()
        yield tokenizer.decode(ids), ids


def _pattern(path: Path) -> str:
    """A path as the pattern that matches it alone, for lm-eval's loader takes it for one."""
    if _UNLOADABLE.search(str(path)):
        raise ValueError(
            f"--output must be a folder that lm-eval can load from: {path} has :: or a $ with a name, which mean "
            "something else there"
        )
    return glob.escape(str(path))


def _quoted(text: str) -> str:
    """A YAML string in quotes; JSON's has half of a surrogate pair where a character is beyond 16 bits."""
    plain = (c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'
