"""emo_megatron.modules.hf.tokenizer: carried along whole, readable by transformers 4, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import words

from emo_megatron.modules.hf.tokenizer import Tokenizer


def test_a_tokenizer_is_carried_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = words.write_tokenizer(tmp_path / "source")
    tokenizer = Tokenizer(source)
    assert len(tokenizer) == 40
    assert tokenizer.ids == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    tokenizer.check(vocab_size=40)
    tokenizer.save(tmp_path / "out")
    text = "experts route the document"
    before, after = (AutoTokenizer.from_pretrained(p) for p in (source, tmp_path / "out"))
    assert after(text)["input_ids"] == before(text)["input_ids"] == [4, 5, 2, 6]
    assert after.eos_token == "<|endoftext|>"


def test_transformers_4_knows_the_class_that_is_written(tmp_path: Path) -> None:
    Tokenizer(words.write_tokenizer(tmp_path / "source")).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_vocabulary_without_rows_for_it_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(words.write_tokenizer(tmp_path / "source"))
    with pytest.raises(
        ValueError, match=r"40 tokens and the model's embedding 39 rows.*--tokenizer"
    ):
        tokenizer.check(vocab_size=39)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer.*--tokenizer"):
        Tokenizer(tmp_path)
