"""The demo's corpus: what sources find, what is written, and that it is written once."""

import gzip
import itertools
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

from demo import corpus as corpora
from demo import sources
from demo.corpus import Corpus, CorpusConfig, describe, prepare_corpus, write_domain
from demo.sources import Machine, Source
from emo_megatron.mcore.dataset import write_indexed_dataset

ALPHABETS = {"latin": "abcdefghij", "cyrillic": "абвгдежзик", "digits": "0123456789"}
NUM_DOCUMENTS = 30


def _words(alphabet: str, *, seed: str) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(60))


def _write_folders(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for number in range(count):
            path = root / name / f"part{number % 3}" / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_words(ALPHABETS.get(name, name), seed=f"{name} {number}"))
    return root


def _config(corpus_dir: Path | None, **options: int) -> CorpusConfig:
    small = {"min_documents": 12, "min_document_chars": 50, "vocab_size": 400}
    return CorpusConfig(corpus_dir=corpus_dir, **{**small, **options})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_folders(tmp_path_factory.mktemp("in"), dict.fromkeys(ALPHABETS, NUM_DOCUMENTS))


@pytest.fixture(scope="module")
def corpus(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"), _config(folders))


def _documents(corpus: Corpus) -> dict[str, list[list[int]]]:
    dataset = IndexedDataset(str(corpus.path / "train"))
    documents = {"train": [dataset[index].tolist() for index in range(len(dataset))]}
    for split in corpora.UNTRAINED_SPLITS:
        documents[split] = []
        for domain in corpus.domains:
            validation_data = load_file(corpus.path / split / f"{domain}.safetensors")
            tokens, ends = validation_data["tokens"], validation_data["cu_seqlens"]
            assert tokens.dtype == ends.dtype == torch.int32
            documents[split] += [tokens[a:b].tolist() for a, b in itertools.pairwise(ends.tolist())]
    return documents


def _texts(corpus: Corpus) -> dict[str, list[str]]:
    decode = AutoTokenizer.from_pretrained(corpus.path / "tokenizer").decode
    return {split: [decode(ids[:-1]) for ids in d] for split, d in _documents(corpus).items()}


def test_documents_come_back_whole_mixed_and_in_one_split_only(folders: Path, corpus: Corpus) -> None:
    originals = {path.read_text() for path in folders.rglob("*.txt")}
    texts = _texts(corpus)
    every = [text for split in texts.values() for text in split]
    assert set(every) <= originals
    assert len(every) == len(set(every))
    # a sixth of 30 documents each; balancing takes at most a few of the rest
    assert len(texts["calibration"]) == len(texts["validation"]) == 3 * 5
    assert 3 * 18 <= len(texts["train"]) <= 3 * 20
    kinds = [next(n for n, a in ALPHABETS.items() if t[0] in a) for t in texts["train"]]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > len(kinds) // 3


def test_every_document_ends_with_the_only_eod_in_it(corpus: Corpus) -> None:
    for tokens in itertools.chain.from_iterable(_documents(corpus).values()):
        assert tokens.index(corpora.EOD_TOKEN) == len(tokens) - 1


def test_megatron_reads_what_the_manifest_says(corpus: Corpus) -> None:
    dataset = IndexedDataset(str(corpus.path / "train"))
    rows = corpus.manifest["domains"].values()
    assert len(dataset) == sum(row["documents"]["train"] for row in rows)
    assert int(dataset.sequence_lengths.sum()) == corpus.train_tokens
    assert len(dataset.document_indices) == len(dataset) + 1
    assert dataset.index.dtype.__name__ == "uint16"
    for domain, split in itertools.product(corpus.domains, corpora.UNTRAINED_SPLITS):
        validation_data = load_file(corpus.path / split / f"{domain}.safetensors")
        tokens, cu_seqlens = validation_data["tokens"], validation_data["cu_seqlens"]
        row = corpus.manifest["domains"][domain]
        assert len(tokens) == cu_seqlens[-1] == row["tokens"][split]
        assert len(cu_seqlens) == row["documents"][split] + 1


def test_the_tokenizer_loads_in_transformers_and_megatron(corpus: Corpus) -> None:
    tokenizer = AutoTokenizer.from_pretrained(corpus.path / "tokenizer")
    assert len(tokenizer) == corpus.manifest["vocab_size"] <= 400
    assert tokenizer.eos_token_id == corpora.EOD_TOKEN == corpus.manifest["eod_token"] == 0
    assert HuggingFaceTokenizer(str(corpus.path / "tokenizer")).eos_id == 0
    text = "  spaces,\tжизнь\n\nand symbols \U0001f600 <|"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_learns_from_training_documents_only() -> None:
    texts = {"train": ["ab" * 100] * 20, "calibration": ["xy" * 100] * 20, "validation": []}
    vocabulary = corpora._train_tokenizer({"domain": texts}, vocab_size=300).get_vocab()
    assert any("ab" in token for token in vocabulary)
    assert not any("xy" in token for token in vocabulary)


def test_two_runs_are_equal_and_another_seed_is_not(folders: Path, corpus: Corpus, tmp_path: Path) -> None:
    again = prepare_corpus(tmp_path / "again", _config(folders))
    assert again.manifest == corpus.manifest
    for name in ("train.bin", "train.idx", "tokenizer/tokenizer.json"):
        assert (again.path / name).read_bytes() == (corpus.path / name).read_bytes()
    other = prepare_corpus(tmp_path / "other", _config(folders, seed=5))
    assert other.manifest["fingerprint"] != corpus.manifest["fingerprint"]


def test_a_finished_corpus_is_returned_without_reading_or_writing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_corpus(tmp_path, _config(folders))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_collect", None)
        assert prepare_corpus(tmp_path, _config(folders)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times
    # another config, and a run that was cut off before the manifest, start over
    assert prepare_corpus(tmp_path, _config(folders, vocab_size=300)).manifest["vocab_size"] == 300
    (tmp_path / "corpus.json").unlink()
    (tmp_path / "train.bin").write_bytes(b"cut off")
    assert prepare_corpus(tmp_path, _config(folders)).manifest == first.manifest
    assert (tmp_path / "train.bin").stat().st_size == 2 * first.train_tokens


def test_unusable_documents_and_copies_are_left_out(tmp_path: Path) -> None:
    folders = _write_folders(tmp_path / "in", dict.fromkeys(ALPHABETS, NUM_DOCUMENTS))
    first = folders / "cyrillic"
    good = (first / "part0" / "0.txt").read_text()
    (first / "copy").write_text(good.replace(" ", "\n  "))
    (folders / "latin" / "copy_elsewhere").write_text(good)
    (first / "short").write_text("abc def")
    (first / "boundary").write_text(f"{_words('abc', seed='boundary')} <|endoftext|> abc")
    (first / "binary").write_text(f"{_words('abc', seed='binary')}\0")
    (first / "latin1").write_bytes(b"\xe9\xff" * 200)
    corpus = prepare_corpus(tmp_path / "out", _config(folders))
    rows = corpus.manifest["domains"].values()
    assert sum(row["documents"]["validation"] for row in rows) == 3 * (NUM_DOCUMENTS // 6)
    texts = [" ".join(text.split()) for split in _texts(corpus).values() for text in split]
    assert len(set(texts)) == len(texts) <= 3 * NUM_DOCUMENTS
    assert not any("endoftext" in text or "\0" in text or len(text) < 50 for text in texts)


def test_long_documents_are_cut_at_a_line_end() -> None:
    text = "".join(f"line {number}  \r\n\n\n\n" for number in range(100))
    cut = corpora.clean(text, max_chars=95)
    assert cut == "\n\n".join(f"line {number}" for number in range(len(cut.split("\n\n"))))
    assert 80 <= len(cut) <= 95
    assert corpora.clean("x" * 200, max_chars=95) == "x" * 95


def test_long_texts_become_documents_of_one_split_and_of_one_domain(tmp_path: Path) -> None:
    counts = {"latin": 14, "cyrillic": 14, "digits": 14}
    folders = tmp_path / "in"
    for name, count in counts.items():
        for number in range(count):
            path = folders / name / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            # every line names its file
            lines = [f"{number}: {_words(ALPHABETS[name], seed=f'{name} {number} {line}')}" for line in range(12)]
            path.write_text("\n".join(lines))
    config = _config(folders, max_document_chars=900, max_text_chars=4000)
    corpus = prepare_corpus(tmp_path / "out", config)
    texts = _texts(corpus)
    assert sum(map(len, texts.values())) > sum(counts.values())
    assert max(len(text) for found in texts.values() for text in found) <= 900
    domains = {letter: name for name, alphabet in ALPHABETS.items() for letter in alphabet}
    files = {
        split: {
            (number, domains[letter]) for text in found for number, letter in re.findall(r"^(\d+): (.)", text, re.M)
        }
        for split, found in texts.items()
    }
    assert sum(map(len, files.values())) == len(set().union(*files.values())) == sum(counts.values())
    rows = corpus.manifest["domains"]
    for name in corpus.domains:
        write_domain(corpus, name, tmp_path / name)
        written = IndexedDataset(str(tmp_path / name))
        assert len(written) == rows[name]["documents"]["train"]
        assert sum(len(written[n]) for n in range(len(written))) == rows[name]["tokens"]["train"]
        letters = {*ALPHABETS[name], *"0123456789: \n"}
        decode = AutoTokenizer.from_pretrained(corpus.path / "tokenizer").decode
        assert all({*decode(written[n].tolist()[:-1])} <= letters for n in range(len(written)))


def test_no_domain_has_more_training_tokens_than_the_median_one(tmp_path: Path) -> None:
    folders = _write_folders(tmp_path / "in", {"latin": 120, "cyrillic": 40, "digits": 20})
    corpus = prepare_corpus(tmp_path / "out", _config(folders))
    tokens = {name: row["tokens"]["train"] for name, row in corpus.manifest["domains"].items()}
    assert tokens["digits"] < tokens["cyrillic"]
    assert 0.9 * tokens["cyrillic"] < tokens["latin"] <= tokens["cyrillic"]


def test_folders_with_too_few_documents_are_left_out_and_named(tmp_path: Path) -> None:
    folders = _write_folders(tmp_path / "in", {"latin": 30, "cyrillic": 30, "digits": 5})
    with pytest.raises(ValueError, match="latin 30") as error:
        prepare_corpus(tmp_path / "out", _config(folders))
    for words in ("needs 3 domains", "cyrillic 30", "digits 5", "--corpus DIR", "DIR/<domain>/"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="found documents: none"):
        prepare_corpus(tmp_path / "out", _config(tmp_path / "missing"))
    _write_folders(folders, {"greek": 30})
    with pytest.warns(UserWarning, match="digits 5"):
        corpus = prepare_corpus(tmp_path / "out", _config(folders))
    assert corpus.domains == ["cyrillic", "greek", "latin"]


def test_machine_domains_follow_the_preference_and_stop_when_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def source(name: str, count: int) -> Source:
        texts = [_words("abcdefgh", seed=f"{name} {number}") for number in range(count)]
        return Source(name, f"words of {name}", lambda machine, rng: iter(texts))

    # the last one cannot be read: there are enough domains before it
    listed = (source("b", 20), source("small", 11), source("a", 20), source("c", 20))
    monkeypatch.setattr(corpora, "MACHINE_SOURCES", (*listed, Source("z", "", None)))
    corpus = prepare_corpus(tmp_path, _config(None, max_domains=3))
    assert corpus.domains == ["b", "a", "c"]
    table = describe(corpus).splitlines()
    assert [line.split()[0] for line in table] == ["domain", "b", "a", "c", "all"]
    assert "words of a" in table[2]
    assert f"{corpus.train_tokens:,}" in table[-1]


def test_a_source_is_read_no_further_than_needed() -> None:
    texts = (_words("abcdef", seed=str(number)) for number in itertools.count())
    documents = corpora.read_documents(texts, seen=set(), config=_config(None, bytes_per_domain=6000))
    sizes = [len(text) for text in documents.values()]
    assert sum(sizes) >= 6000 > sum(sizes[:-1])
    assert len(corpora.read_documents(texts, seen=set(), config=_config(None, bytes_per_domain=1))) == 12


@pytest.mark.parametrize("documents", [[[1, 2], []], [[1, 5]], [[-1]], []])
def test_bad_documents_leave_no_dataset(tmp_path: Path, documents: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"document"):
        write_indexed_dataset(tmp_path / "data", documents, vocab_size=5)
    assert list(tmp_path.iterdir()) == []


def _machine(tmp_path: Path, files: dict[str, str | bytes]) -> Machine:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return Machine(root=tmp_path, stdlib=tmp_path / "lib/python", packages=tmp_path / "packages")


def _found(machine: Machine, name: str, *, seed: int = 0) -> list[str]:
    source = next(source for source in sources.MACHINE_SOURCES if source.name == name)
    documents = source.documents(machine, rng=random.Random(seed))
    return [document for document in documents if document.strip()]


def _catalog(messages: dict[str, str], *, order: str) -> bytes:
    tables, strings = [b"", b""], b""
    for message in messages.items():
        for index, text in enumerate(message):
            start = 28 + 16 * len(messages) + len(strings)
            tables[index] += struct.pack(f"{order}2I", len(text.encode()), start)
            strings += text.encode() + b"\0"
    offsets = (28, 28 + 8 * len(messages))
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(messages), *offsets, 0, 0)
    return head + b"".join(tables) + strings


def test_sources_find_nothing_on_an_empty_machine(tmp_path: Path) -> None:
    names = [source.name for source in sources.MACHINE_SOURCES]
    assert not any(_found(_machine(tmp_path, {}), name) for name in names)
    assert len(names) == len(set(names)) >= 8


@pytest.mark.parametrize("order", ["<", ">"])
def test_message_catalogs_give_their_translations(tmp_path: Path, order: str) -> None:
    long, plural = "Tür und Tor geschlossen", "eine Datei gelöscht\0%d Dateien gelöscht"
    texts = {"": "Content-Type: text/plain; charset=UTF-8", "door": long, "a\0b": plural}
    data = _catalog(texts | {"same " * 4: "same " * 4, "ok": "ja"}, order=order)
    folder = "usr/share/locale/fr/LC_MESSAGES"
    iso = _catalog({"a": "Namen von Sprachen, Namen von Orten"}, order=order)
    files = {f"{folder}/a.mo": data, f"{folder}/iso_639.mo": iso, f"{folder}/cut.mo": data[:60]}
    machine = _machine(tmp_path, files | {f"{folder}/no.mo": b"something else"})
    assert _found(machine, "fr") == [f"{long}\n{plural}".replace("\0", "\n")]


def test_man_pages_become_plain_text(tmp_path: Path) -> None:
    page = r"""'\" t
.de XX
hidden
..
.TH TOOL 1 "today"
.SH NAME
tool \- do \fBone\fR thing
.if n hidden
.TS
hidden
.TE
.TP
.BR \-v ", " \-\-verbose
Say \(lqmore\(rq.\" hidden
.IP "a tag" 4
See
.BR other (1)."""
    machine = _machine(tmp_path, {"usr/share/man/man1/tool.1.gz": page})
    expected = 'NAME tool - do one thing -v, --verbose Say "more". a tag See other(1).'
    assert " ".join("".join(_found(machine, "man")).split()) == expected


def test_code_is_cut_into_definitions_without_licences(tmp_path: Path) -> None:
    body = "".join(f"    x{number} = open('file{number}')\n" for number in range(40))
    function = f'def read():\n    """{"Read it. " * 70}"""\n{body}'
    licence, note = "/*\n * Copyright 2020 Me\n */", "/* what it is for */\nint f(void);\n"
    files = {
        "lib/python/a.py": f"# Copyright\nimport os\n{function}",
        "lib/python/test/test_a.py": function.replace("read", "test_read"),
        "lib/python/test/broken.py": "def (",
        "usr/include/a.h": f"#ifndef A\n{licence}\n{note}#endif\n",
        "usr/share/javascript/a.js": f"// (c) 2020 Me\n\n// adds\nf = (a) => a;\n{licence}\n",
        "usr/share/javascript/a.min.js": "x=1;" * 200,
        "usr/share/perl/a.pm": "# Licence: none\nuse strict;\n",
    }
    machine = _machine(tmp_path, files)
    assert _found(machine, "python") == [function]
    assert _found(machine, "docstring") == ["Read it. " * 70]
    assert _found(machine, "c_header") == [f"#ifndef A\n{note}#endif\n"]
    assert _found(machine, "javascript") == ["\n// adds\nf = (a) => a;\n"]
    assert _found(machine, "perl") == ["use strict;\n"]


def test_debian_packages_and_changelogs_count_once_a_source(tmp_path: Path) -> None:
    record = "Package: {}\nSource: tool\nSize: 7\nDescription: opens doors\nSHA256: 00\n\n"
    script = f"#!/bin/sh\ncat <<END\n{record.format('tool')}{record.format('tool-doc')}END\n"
    entries = "".join(f"tool (1.{n}) x; y=z\n\n  * {'Fix. ' * 90}\n\n" for n in range(9))
    paths = [f"usr/share/doc/{name}/changelog.Debian.gz" for name in ("tool", "tool-doc")]
    machine = _machine(tmp_path, {"usr/bin/apt-cache": script, **dict.fromkeys(paths, entries)})
    (tmp_path / "usr/bin/apt-cache").chmod(0o755)
    (package,) = _found(machine, "package")
    assert package.splitlines()[1:] == ["Source: tool", "Description: opens doors"]
    first, second = _found(machine, "changelog")
    assert first != second


def test_any_beginning_is_a_fair_sample_in_an_order_of_the_seed(tmp_path: Path) -> None:
    files = {f"usr/include/big/{number}.h": f"// big {number}\n" for number in range(50)}
    files |= {f"usr/include/{name}.h": f"// {name}\n" for name in "abc"}
    machine = _machine(tmp_path, files)
    found = _found(machine, "c_header")
    assert {"// a\n", "// b\n", "// c\n"} < set(found[:4])
    assert len(set(found)) == 53
    assert found == _found(machine, "c_header") != _found(machine, "c_header", seed=1)
