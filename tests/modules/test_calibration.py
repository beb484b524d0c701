"""Calibration documents: which are taken, how they are read, how rows hold them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from emo_megatron.modules.calibration import (
    Calibration,
    empty_row,
    load_documents,
    pack_rows,
)

ALL = Calibration()


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tokens(path, documents):
    bounds = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0).int()
    save_file({"tokens": torch.cat(documents).int(), "cu_seqlens": bounds}, path)
    return path


def letters(text):
    return [ord(letter) for letter in text] + [0]


def test_examples_are_nested_and_shots_are_none_of_them():
    taken = [Calibration(num_examples=n, num_shots=2, seed=4).pick(10) for n in (1, 3, 8)]
    for (fewer, shots), (more, same_shots) in itertools.pairwise(taken):
        assert more[: len(fewer)] == fewer
        assert shots == same_shots
    examples, shots = taken[-1]
    assert sorted(examples + shots) == list(range(10))
    assert Calibration(num_examples=3, seed=5).pick(10) != Calibration(num_examples=3).pick(10)
    assert ALL.pick(3) == ([0, 1, 2], [])
    with pytest.raises(ValueError, match="9 examples with 2 shots need 11 documents; got 10"):
        Calibration(num_examples=9, num_shots=2).pick(10)


@pytest.mark.parametrize("wrong", [{"num_examples": 0}, {"num_shots": -1}, {"num_tokens": 0}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Calibration(**wrong)


def test_shots_stand_in_front_of_an_example_in_one_document(tmp_path):
    chosen = Calibration(num_examples=1, num_shots=2, seed=1)
    (example,), shots = chosen.pick(4)
    texts = ["aa", "b", "cc", "d"]
    read = load_documents(
        write_jsonl(tmp_path / "t.jsonl", texts), calibration=chosen, tokenize=letters
    )
    text = "\n\n".join(texts[at] for at in (*shots, example))
    assert [d.tolist() for d in read.tokens] == [letters(text)]
    tokens = [torch.tensor([*range(10 * n, 10 * n + 3), 0]) for n in range(1, 5)]
    read = load_documents(write_tokens(tmp_path / "t.safetensors", tokens), calibration=chosen)
    want = [t for at in shots for t in tokens[at].tolist()[:-1]] + tokens[example].tolist()
    assert [d.tolist() for d in read.tokens] == [want]


def test_the_source_says_what_was_taken(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ["one", "two", "three", "four"])
    some = Calibration(num_tokens=7)
    read = load_documents(path, calibration=some, tokenize=letters)
    assert read.num_tokens == 8
    assert read.source["file"] == "t.jsonl"
    assert (read.source["documents"], read.source["tokens"]) == (2, 8)
    assert read.source["num_tokens"] == 7
    again = load_documents(path, calibration=some, tokenize=letters)
    assert again.source == read.source
    more = load_documents(path, calibration=ALL, tokenize=letters)
    assert more.source["sha256"] != read.source["sha256"]


def test_bad_files_are_refused_with_the_place(tmp_path):
    path = tmp_path / "t.jsonl"
    for text, what in [
        ('{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ('{"text": "a"}\n\n["b"]\n', 'line 3: must be an object with a "text"'),
        ("\n", "holds no document"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            load_documents(path, calibration=ALL, tokenize=letters)
    write_jsonl(path, ["a"])
    with pytest.raises(ValueError, match="--tokenizer"):
        load_documents(path, calibration=ALL)
    tokens = write_tokens(tmp_path / "t.safetensors", [torch.tensor([5, 99])])
    with pytest.raises(ValueError, match=r"\[0, 50\).*5 to 99"):
        load_documents(tokens, calibration=ALL, vocab_size=50)
    save_file({"tokens": torch.arange(3), "cu_seqlens": torch.tensor([0, 2])}, tokens)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 3 tokens"):
        load_documents(tokens, calibration=ALL)
    save_file({"tokens": torch.arange(3)}, tokens)
    with pytest.raises(ValueError, match='must hold "tokens" and "cu_seqlens"'):
        load_documents(tokens, calibration=ALL)
    tokens.write_bytes(tokens.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short"):
        load_documents(tokens, calibration=ALL)
    (tmp_path / "t.csv").write_text("a")
    with pytest.raises(ValueError, match=r"must be a \.jsonl file"):
        load_documents(tmp_path / "t.csv", calibration=ALL)
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing"):
        load_documents(tmp_path / "missing", calibration=ALL)


@pytest.mark.parametrize("lengths", [(3, 4), (8,), (9, 1), (20, 2, 5, 8), (1,) * 17])
def test_rows_hold_every_token_once_and_know_what_comes_next(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    documents = [torch.arange(s + 1, s + n + 1) for s, n in zip(starts, lengths, strict=False)]
    rows = list(pack_rows(documents, seq_length=8))
    seen = [row.tokens_S[: sum(row.lengths)] for row in rows]
    assert torch.equal(torch.cat(seen), torch.cat(documents))
    ends = {int(document[-1]) for document in documents}
    for row in rows:
        assert row.tokens_S.shape == (8,)
        assert (row.tokens_S[sum(row.lengths) :] == 0).all()
        for token, label, is_predicted in zip(
            row.tokens_S.tolist(),
            row.labels_S.tolist(),
            row.is_predicted_S.tolist(),
            strict=True,
        ):
            assert is_predicted == (token > 0 and token not in ends)
            if is_predicted:
                assert label == token + 1
    # a document that fits is in one piece
    assert sum(len(row.lengths) for row in rows) == sum(-(-n // 8) for n in lengths)


def test_an_empty_row_is_padding():
    row = empty_row(4)
    assert row.lengths == ()
    assert not row.is_predicted_S.any()
    assert row.labels_S.tolist() == row.tokens_S.tolist() == [0] * 4
