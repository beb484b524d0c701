"""Calibration documents: which are taken, how they are read, how rows hold them."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.words import write_texts, write_tokens

from emo_megatron.experts.calibration import Calibration, empty_row, load_documents, pack_rows

ALL = Calibration()


def letters(text):
    return [ord(letter) for letter in text] + [0]


LETTERS = SimpleNamespace(end=0, encode=letters)


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
    read = load_documents(write_texts(tmp_path / "t.jsonl", texts), calibration=chosen, tokenizer=LETTERS)
    text = "\n\n".join(texts[at] for at in (*shots, example))
    assert [d.tolist() for d in read.tokens] == [letters(text)]
    tokens = [torch.tensor([*range(10 * n, 10 * n + 3), 0]) for n in range(1, 5)]
    read = load_documents(write_tokens(tmp_path / "t.safetensors", tokens), calibration=chosen)
    want = [t for at in shots for t in tokens[at].tolist()[:-1]] + tokens[example].tolist()
    assert [d.tolist() for d in read.tokens] == [want]


def test_the_source_says_what_was_taken(tmp_path):
    path = write_texts(tmp_path / "t.jsonl", ["one", "two", "three", "four"])
    some = Calibration(num_tokens=7)
    read = load_documents(path, calibration=some, tokenizer=LETTERS)
    assert read.num_tokens == 8
    assert read.source["file"] == "t.jsonl"
    assert (read.source["documents"], read.source["tokens"]) == (2, 8)
    assert read.source["num_tokens"] == 7
    again = load_documents(path, calibration=some, tokenizer=LETTERS)
    assert again.source == read.source
    more = load_documents(path, calibration=ALL, tokenizer=LETTERS)
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
            load_documents(path, calibration=ALL, tokenizer=LETTERS)
    write_texts(path, ["a"])
    with pytest.raises(ValueError, match="--tokenizer"):
        load_documents(path, calibration=ALL)
    tokens = tmp_path / "t.safetensors"
    save_file({"tokens": torch.arange(3)}, tokens)
    with pytest.raises(ValueError, match='"cu_seqlens"'):
        load_documents(tokens, calibration=ALL)
    tokens.write_bytes(tokens.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut short"):
        load_documents(tokens, calibration=ALL)
    (tmp_path / "t.csv").write_text("a")
    with pytest.raises(ValueError, match=r"must be a \.jsonl file"):
        load_documents(tmp_path / "t.csv", calibration=ALL)
    with pytest.raises(FileNotFoundError, match=r"missing must be a file"):
        load_documents(tmp_path / "missing", calibration=ALL)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut \\ud83d here"}', r"Unicode.*\\ud83d.*character 4"),
        (b'{"text": "\xe9"}', "UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-8"),
        (b"[" * 100_000, "JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "JSON"),
        (b'{"text": null}', '"text"'),
        (b"\xef\xbb\xbf" + b'{"text": "a"}', "BOM"),
    ],
)
def test_a_line_that_is_no_text_is_named(tmp_path, line, what):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"t\.jsonl, line 2: .*{what}") as error:
        load_documents(path, calibration=ALL, tokenizer=LETTERS)
    assert "\n" not in str(error.value)


def test_texts_are_read_byte_for_byte(tmp_path):
    path = tmp_path / "t.jsonl"
    texts = ["a\u2028b\x85\x0c", "\0", "\U0001f600", " \r\n "]
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes("\r\n\n".join(lines).encode())
    read = load_documents(path, calibration=ALL, tokenizer=LETTERS)
    assert [document.tolist() for document in read.tokens] == [letters(text) for text in texts]


@pytest.mark.parametrize(
    ("tokens", "bounds", "what"),
    [
        (torch.arange(4.0), torch.tensor([0, 4]), '"tokens".*float32'),
        (torch.ones(4, dtype=torch.bool), torch.tensor([0, 4]), '"tokens".*bool'),
        (torch.arange(4).view(2, 2), torch.tensor([0, 4]), r'"tokens".*\[2, 2\]'),
        (torch.arange(4), torch.tensor([0.0, 1.5, 4.0]), '"cu_seqlens".*float32'),
        (torch.arange(4), torch.tensor([[0, 4]]), r'"cu_seqlens".*\[1, 2\]'),
        (torch.arange(4), torch.tensor([0, 3, 2, 4]), "entry 2 falls"),
        *((torch.arange(4), torch.tensor([0, end]), f"0 to {end}") for end in (3, 5)),
        (torch.arange(4), torch.tensor([], dtype=torch.int64), "got none"),
        (torch.arange(4), torch.tensor([0, 2, 9, 4], dtype=torch.uint16), "entry 3 falls"),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path, tokens, bounds, what):
    path = tmp_path / "t.safetensors"
    save_file({"tokens": tokens, "cu_seqlens": bounds}, path)
    with pytest.raises(ValueError, match=rf"t\.safetensors.*{what}"):
        load_documents(path, calibration=ALL)


def test_tokens_outside_the_vocabulary_are_found_in_their_document(tmp_path):
    tokens = [torch.tensor(ids) for ids in ([1, 2], [3], [4, 50])]
    path = write_tokens(tmp_path / "t.safetensors", tokens)
    assert load_documents(path, calibration=ALL, vocab_size=51).num_tokens == 5
    with pytest.raises(ValueError, match=r"t\.safetensors, document 3 has 4 to 50"):
        load_documents(path, calibration=ALL, vocab_size=50)


def test_a_folder_is_no_file_of_documents(tmp_path):
    for name in ("x.jsonl", "x.safetensors", "x"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=rf"{name} must be .* it is a folder"):
            load_documents(tmp_path / name, calibration=ALL, tokenizer=LETTERS)


def test_documents_without_a_token_are_left_out(tmp_path):
    path = write_texts(tmp_path / "t.jsonl", ["a", "", "b"])
    read = load_documents(
        path, calibration=ALL, tokenizer=SimpleNamespace(end=None, encode=lambda text: [ord(c) for c in text])
    )
    assert [document.tolist() for document in read.tokens] == [[97], [98]]
    assert read.source["documents"] == 2


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
            row.tokens_S.tolist(), row.labels_S.tolist(), row.is_predicted_S.tolist(), strict=True
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
