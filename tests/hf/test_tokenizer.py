"""emo_megatron.hf.tokenizer: carried along whole, readable by transformers 4, refused where it does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import words

from emo_megatron.hf.tokenizer import Tokenizer


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


def test_the_chat_template_and_the_settings_of_generation_are_carried_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    source, settings = words.write_tokenizer(tmp_path / "source"), {"eos_token_id": [0, 5], "temperature": 0.6}
    template = "{% for message in messages %}{{ message['content'] }} of {% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    (source / "generation_config.json").write_text(json.dumps(settings))
    # twice: an import and an export
    Tokenizer(source).save(tmp_path / "imported")
    Tokenizer(tmp_path / "imported").save(tmp_path / "exported")
    after = AutoTokenizer.from_pretrained(tmp_path / "exported")
    messages = [{"role": "user", "content": "pool"}]
    assert after.apply_chat_template(messages, tokenize=False) == "pool of "
    read = GenerationConfig.from_pretrained(tmp_path / "exported")
    assert (read.eos_token_id, read.temperature) == ([0, 5], 0.6)
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        Tokenizer(source).generation()


GENERATION_FIELDS = {
    "allowed": ({"eos_token_id": [0, 39], "pad_token_id": None, "max_length": 99, "bos_token_id": 1}, None),
    "above": ({"eos_token_id": 40}, "eos_token_id"),
    "in a list": ({"eos_token_id": [0, 40]}, "eos_token_id"),
    "below": ({"pad_token_id": -1}, "pad_token_id"),
    "a text": ({"bos_token_id": "0"}, "bos_token_id"),
    "a switch": ({"decoder_start_token_id": True}, "decoder_start_token_id"),
}


@pytest.mark.parametrize("name", GENERATION_FIELDS)
def test_generation_has_only_tokens_of_the_model(tmp_path: Path, name: str) -> None:
    settings, field = GENERATION_FIELDS[name]
    source = words.write_tokenizer(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(settings))
    if field is None:
        assert Tokenizer(source).generation(vocab_size=40) == settings
        return
    with pytest.raises(ValueError, match=rf"generation_config\.json: {field} ") as error:
        Tokenizer(source).generation(vocab_size=40)
    assert len(str(error.value).splitlines()) == 1


def test_generation_ends_where_documents_end(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    Tokenizer(words.write_tokenizer(tmp_path / "source")).save(tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_transformers_4_knows_the_class_that_is_written(tmp_path: Path) -> None:
    Tokenizer(words.write_tokenizer(tmp_path / "source")).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_further_special_tokens_have_the_name_that_transformers_4_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = words.write_tokenizer(tmp_path / "source")
    turns = ["<turn>", "</turn>"]
    changed = AutoTokenizer.from_pretrained(source)
    changed.add_special_tokens({"additional_special_tokens": turns})
    changed.save_pretrained(source)
    Tokenizer(source).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == turns
    assert "extra_special_tokens" not in config
    # transformers 5 reads the same tokens from both folders
    read = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert read[0].all_special_tokens == read[1].all_special_tokens
    assert set(turns) < set(read[1].all_special_tokens)
    assert read[0]("the <turn> pool")["input_ids"] == read[1]("the <turn> pool")["input_ids"]


def test_ids_with_gaps_need_rows_up_to_the_largest(tmp_path: Path) -> None:
    source = words.write_tokenizer(tmp_path / "source")
    stored = json.loads((source / "tokenizer.json").read_text())
    stored["model"]["vocab"] = {t: 70 if n == 39 else n for t, n in stored["model"]["vocab"].items()}
    (source / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = Tokenizer(source)
    assert len(tokenizer) == 40
    tokenizer.check(vocab_size=71)
    with pytest.raises(ValueError, match=r"70.*--tokenizer"):
        tokenizer.check(vocab_size=70)


def test_a_vocabulary_without_rows_for_it_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(words.write_tokenizer(tmp_path / "source"))
    with pytest.raises(ValueError, match=r"40 tokens .*embedding 39 rows.*--tokenizer"):
        tokenizer.check(vocab_size=39)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer.*--tokenizer"):
        Tokenizer(tmp_path)


DAMAGE = {
    "tokenizer.json": ('{"version": ', "[]", '{"version": "1.0"}', "version https://git-lfs"),
    "tokenizer_config.json": ("{", "[]", "version https://git-lfs"),
    "special_tokens_map.json": ("{",),
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_tokenizer_is_one_line_with_its_file(tmp_path: Path, name: str, content: str) -> None:
    folder = words.write_tokenizer(tmp_path / "source")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))) as error:
        Tokenizer(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "NoSuch"])
def test_a_vocabulary_that_is_missing_is_no_empty_one(tmp_path: Path, kind: str) -> None:
    folder = words.write_tokenizer(tmp_path / "source")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=str(folder)):
        Tokenizer(folder)


def test_code_of_a_folder_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    folder = words.write_tokenizer(tmp_path / "source")
    own = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["own.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=str(folder)):
        Tokenizer(folder)


@pytest.mark.parametrize("name", words.SPECIAL)
def test_a_document_has_one_end_and_nothing_in_front(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer(words.write_tokenizer(tmp_path / "source", **words.SPECIAL[name]))
    end = [] if name in ("no end", "nothing") else [0]
    assert tokenizer.end == (end[0] if end else None)
    assert tokenizer.encode("the pool") == [2, 7, *end]
    assert tokenizer.encode("") == end
    assert not tokenizer.has_text(tokenizer.encode(""))
    assert tokenizer.has_text(tokenizer.encode("unheard"))
