"""llama.cpp reads text as transformers does, for every rule of splitting text into words that `export` accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import decoder
from support.engines import ENGINES, ROOT
from support.words import adds_first, split_by, write_bytes

from emo_megatron.hf import gguf
from emo_megatron.hf.gguf_vocabulary import RULES, Vocabulary
from emo_megatron.hf.tokenizer import Tokenizer

pytestmark = pytest.mark.serve

TEXTS = [
    "the pool of  the document's experts\n\n\tchooses 12345 EXPERTS we'LL  ",
    "Ünïcödé Это русский 中文字 🙂\u200d🔥  x\r\n\r\n  end ½ ²",
    "def f(x):\n    return x**2  # 100%, \"don't\" I'm they'RE\n",
    "<tool>call</tool> and <|endoftext|> then <first> again",
    (ROOT / "README.md").read_text(encoding="utf-8"),
]


def change_of(regex: str, *, ignores_merges: bool, has_first: bool) -> Any:
    def change(stored: dict[str, Any]) -> None:
        split_by(regex)(stored)
        stored["model"]["ignore_merges"] = ignores_merges
        # the last token becomes " EXPERTS", which no merge makes: only a tokenizer that ignores merges for whole words
        # finds this token
        vocabulary, last = stored["model"]["vocab"], stored["model"]["merges"].pop()
        assert "ĠEXPERTS" not in vocabulary
        vocabulary["ĠEXPERTS"] = vocabulary.pop("".join(last))
        if has_first:
            adds_first(stored)

    return change


def test_llama_cpp_reads_the_tokens_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (engine,) = (engine.required() for engine in ENGINES if engine.name == "llama-cpp-python")
    model, files, expected = decoder.architecture(vocab_size=820), {}, {}
    read = decoder.random_weights(model).__getitem__
    for (regex, ignores_merges), rule in RULES.items():
        for has_first in (False, True):
            name = f"{rule}, {has_first}"
            change = change_of(regex, ignores_merges=ignores_merges, has_first=has_first)
            folder = write_bytes(tmp_path / name, text="".join(TEXTS), size=800, change=change)
            vocabulary, file = Vocabulary(Tokenizer(folder), rows=820), tmp_path / f"{name}.gguf"
            gguf.write(file, architecture=model, read=read, dtype=torch.float32, vocabulary=vocabulary, name=name)
            files[name] = str(file)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            expected[name] = [tokenizer(text)["input_ids"] for text in TEXTS]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"files": files, "texts": TEXTS}))
    found = engine.answer("tokens_llama_cpp.py", job, tmp_path / "result.json", work=tmp_path)
    assert {name: found[name] for name in files} == expected
    # all rules differ on these texts: a file with the name of another rule would be seen
    assert len({json.dumps(tokens) for tokens in expected.values()}) == len(expected)
